// The runs with their numbers at the crosshair, and the numbers of the range as a table.

import { element, refill, toggle } from "./elements.js";
import { stepsOf } from "./runs.js";
import { number, percent, whole } from "./scales.js";
import { swatch } from "./styles.js";

const ROWS = 50;
const MANY = 8; // runs from which on there is a search

/** Return the smallest and the largest value of a bucket as text. */
export function between(extremes) {
  if (!extremes || Number.isNaN(extremes[0])) return "–";
  const [low, high] = extremes;
  return low === high ? number(low) : `${number(low, 3)} … ${number(high, 3)}`;
}

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

/** The numbers of the range that is shown, for those who do not see the charts. */
export class NumberTable {
  constructor(page) {
    this.page = page;
    this.body = element("div.scroll");
    this.element = element(
      "details.panel",
      { toggle: () => this.draw() },
      element("summary", {}, "Numbers as a table"),
      this.body,
    );
  }

  draw() {
    if (!this.element.open) return;
    const { map, runs } = this.page;
    const shown = [...runs.shown.flatMap((run) => [run.series, run.colour]), map.table];
    // A reader in the middle of a table is not to lose the place.
    if (
      shown.length === this._drawn?.length &&
      shown.every((each, index) => each === this._drawn[index])
    )
      return;
    this._drawn = shown;
    const tables = runs.shown.filter((run) => run.series).map((run) => this._table(run));
    refill(this.body, tables, map.run && map.table ? this._parameters(map) : null);
  }

  /** The largest value of each parameter of the map, in the range that is shown. */
  _parameters({ table, run, quantityChoice }) {
    const width = table.steps.length;
    const rows = table.names.map((name, row) => {
      const cells = table.high
        .subarray(row * width, (row + 1) * width)
        .filter((value) => !Number.isNaN(value));
      const isBroken = table.nonfinite
        .subarray(row * width, (row + 1) * width)
        .some((each) => each);
      const largest = cells.length ? number(Math.max(...cells)) : "–";
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, name),
        element("td", {}, isBroken ? `${largest}, not finite` : largest),
      );
    });
    const quantity = quantityChoice.selectedOptions[0].text;
    return element(
      "table.numbers",
      {},
      element("caption", {}, swatch(run), `${run.shortName}, ${quantity}`),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          element("th", { scope: "col" }, "Parameter"),
          element("th", { scope: "col" }, "Largest"),
        ),
      ),
      element("tbody", {}, rows),
    );
  }

  _table(run) {
    const { series } = run;
    const { first, last } = this.page.runs.range;
    const inside = [...series.steps.keys()].filter((index) => {
      const [from, to] = stepsOf(series, index);
      return to >= first && from <= last;
    });
    const size = Math.max(Math.ceil(inside.length / ROWS), 1);
    const rows = [];
    for (let begin = 0; begin < inside.length; begin += size) {
      rows.push(this._row(run, inside[begin], inside[Math.min(begin + size, inside.length) - 1]));
    }
    const names = [
      "Steps",
      "Before clipping",
      "After",
      "Threshold",
      "Loss",
      "Not finite",
      "Skipped",
    ];
    return element(
      "table.numbers",
      {},
      element("caption", {}, swatch(run), run.shortName),
      element(
        "thead",
        {},
        element(
          "tr",
          {},
          names.map((name) => element("th", { scope: "col" }, name)),
        ),
      ),
      element("tbody", {}, rows),
    );
  }

  _row(run, from, to) {
    const { series } = run;
    const extremes = (column) => {
      if (!column) return null;
      const [low, high] = [
        column.low.subarray(from, to + 1),
        column.high.subarray(from, to + 1),
      ].map((part) => part.filter((value) => !Number.isNaN(value)));
      return low.length ? [Math.min(...low), Math.max(...high)] : null;
    };
    const total = (count) =>
      count ? whole(count.subarray(from, to + 1).reduce((sum, each) => sum + each, 0)) : "0";
    const [first, last] = [stepsOf(series, from)[0], stepsOf(series, to)[1]];
    const { columns, counts } = series;
    const texts = [
      ...["norm", "clipped_norm", "threshold", "loss"].map((name) =>
        between(extremes(columns[name])),
      ),
      total(counts.nonfinite),
      total(counts.skipped),
    ];
    const steps = first === last ? whole(first) : `${whole(first)} to ${whole(last)}`;
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, steps),
      texts.map((text) => element("td", {}, text)),
    );
  }
}
