// The runs with their numbers at the crosshair.

import { element, refill, toggle } from "./elements.js";
import { between, percent, whole } from "./scales.js";
import { swatch } from "./styles.js";

const MANY = 8; // runs from which on there is a search

/** Return a function that tells whether a name matches a regular expression, or has a text in it. */
function matcher(wanted) {
  try {
    const pattern = new RegExp(wanted, "i");
    return (name) => pattern.test(name);
  } catch {
    return (name) => name.includes(wanted); // half of an expression is being typed
  }
}

/** Return what happened in a bucket as text. */
function marksOf(numbers) {
  const marks = [
    ["nonfinite", "not finite"],
    ["skipped", "skipped"],
    ["loss_nonfinite", "loss not finite"],
  ];
  return marks
    .filter(([name]) => numbers[name])
    .map(([name, text]) => (numbers.size > 1 ? `${numbers[name]} ${text}` : text))
    .join(", ");
}

function stepsText({ first, last }) {
  return first === last ? `step ${whole(first)}` : `steps ${whole(first)} to ${whole(last)}`;
}

/** A row for each run: whether it is shown, and its numbers at the crosshair, or at its last step. */
export class RunTable {
  constructor(page) {
    this.page = page;
    this.caption = element("caption");
    this.body = element("tbody");
    const columns = ["Run", "Before clipping", "After", "Threshold", "Loss", "Clipped", "Remarks"];
    const header = element(
      "tr",
      {},
      columns.map((name) => element("th", { scope: "col" }, name)),
    );
    this.table = element("table.runs", {}, this.caption, element("thead", {}, header), this.body);
    this.field = element("input", {
      type: "search",
      placeholder: "Search runs (regex)",
      "aria-label": "Search runs by name, with a regular expression",
      input: () => this._search(),
    });
    const button = (label, isShown) =>
      element("button.quiet", { type: "button", click: () => this._showFound(isShown) }, label);
    this.choice = element(
      "div.choice",
      { hidden: true },
      this.field,
      button("Show these", true),
      button("Hide these", false),
    );
    this.element = element("div.run-table", {}, this.choice, this.table);
  }

  /** List the runs whose names match what is searched. */
  _search() {
    const matches = matcher(this.field.value);
    for (const each of this._rows) each.row.hidden = !matches(each.run.name);
  }

  _showFound(isShown) {
    const found = this._rows.filter(({ row }) => !row.hidden).map(({ run }) => run);
    this.page.runs.setShown(found, isShown);
  }

  draw() {
    const { runs } = this.page;
    const key = JSON.stringify(
      runs.all.map((run) => [run.id, run.colour, run.shortName, run.isShown]),
    );
    if (key !== this._key) {
      this._key = key;
      this._rows = runs.all.map((run) => this._row(run));
      refill(
        this.body,
        this._rows.map(({ row }) => row),
      );
    }
    this.element.classList.toggle("few", runs.all.length <= 4);
    this.choice.hidden = runs.all.length < MANY;
    this._search();
    this.fill();
  }

  /** Write the numbers at the crosshair. */
  fill() {
    const { runs } = this.page;
    const at = runs.step;
    this.caption.textContent =
      at === null ? "At the last step of each run" : `At step ${whole(at)}`;
    for (const { run, cells } of this._rows ?? []) {
      const numbers = run.isShown ? run.numbersAt(at ?? run.listed.last) : null;
      const texts = numbers
        ? [
            between(numbers.norm),
            between(numbers.clipped_norm),
            between(numbers.threshold),
            between(numbers.loss),
            numbers.clip_rate ? percent(numbers.clip_rate[1]) : "–",
            [numbers.size > 1 ? stepsText(numbers) : "", marksOf(numbers)]
              .filter(Boolean)
              .join("; "),
          ]
        : ["", "", "", "", "", ""];
      texts.forEach((text, index) => {
        cells[index].textContent = text;
      });
    }
  }

  _row(run) {
    const button = toggle(
      element("span.name", { title: run.name }, run.shortName),
      run.isShown,
      (isShown) => this.page.runs.setShown([run], isShown),
      {
        className: "run",
        title: `${run.name}: show or hide`,
      },
    );
    button.prepend(swatch(run));
    const cells = Array.from({ length: 6 }, () => element("td"));
    const { runs } = this.page;
    const focus = () => {
      if (runs.shown.length > 1 && run.isShown) runs.setFocus(run);
    };
    const blur = () => runs.setFocus(null);
    const row = element(
      "tr",
      { mouseenter: focus, mouseleave: blur, focusin: focus, focusout: blur },
      element("th", { scope: "row" }, button),
      cells,
    );
    return { run, cells, row };
  }
}
