// The map of single parameters over the steps: a row for each, those of a module together.

import { StepChart, line } from "./chart.js";
import { firstNotBelow } from "./arrays.js";
import { element, refill } from "./elements.js";
import { number, whole } from "./scales.js";
import { heat } from "./styles.js";

const GRADIENTS = "parameter_norms";
const QUANTITIES = {
  [GRADIENTS]: "gradient norm before clipping",
  weight_norms: "norm of the weights",
  update_ratios: "norm of the update / norm of the weights",
};
const FEW = 24; // rows before all are asked for
const MOST = 1000;
const [ROW, HEADING] = [15, 19];
const LETTER = 6; // pixels
const COLUMNS = 256;

export class HeatMap extends StepChart {
  constructor(page) {
    super(page, "Parameters", 100);
    this.table = null;
    this.drawn = null;
    this._most = FEW;
    this._key = "";
    this._leading = new Set();
    this._mayMiss = null;
    this.runChoice = element("select", {
      "aria-label": "Run of the map",
      change: () => this.refresh(),
    });
    this.quantityChoice = element("select", {
      "aria-label": "Quantity of the map",
      change: () => this.refresh(),
    });
    this.search = element("input", {
      type: "search",
      placeholder: "Search names",
      "aria-label": "Search parameters by name",
      input: () => this.refresh(),
    });
    this.more = element("button.quiet", { type: "button", click: () => this._showMore() });
    this.found = element("p.found", { role: "status" });
    this.scaleBar = element("span.heat-scale");
    this.head.append(element("div.controls", {}, this.runChoice, this.quantityChoice, this.search));
    this.element.append(element("div.under", {}, this.scaleBar, this.found, this.more));
    this.frame.addEventListener("pointermove", (event) => this._point(event));
    this.frame.addEventListener("pointerleave", () => this._say());
  }

  /** Ask for what the map shows, if that has changed. */
  refresh() {
    const { runs } = this.page;
    const withMaps = runs.shown.filter((run) => run.overview.quantities.length);
    choices(
      this.runChoice,
      withMaps.map((run) => [run.id, run.shortName]),
    );
    this.runChoice.hidden = withMaps.length < 2;
    this.run = withMaps.find((run) => run.id === this.runChoice.value) ?? withMaps[0];
    if (!this.run) {
      this.table = null;
      return;
    }
    const { quantities } = this.run.overview;
    choices(
      this.quantityChoice,
      quantities.map((name) => [name, QUANTITIES[name] ?? name]),
    );
    const quantity = quantities.includes(this.quantityChoice.value)
      ? this.quantityChoice.value
      : quantities[0];
    const range = { ...runs.range, buckets: COLUMNS };
    const question = [this.run.id, quantity, range, this.search.value.trim(), this._most];
    const key = JSON.stringify([...question, this.run.overview.steps]);
    if (key === this._key) return;
    this._key = key;
    this._isAsking = true;
    const answered = runs.source.parameters(...question).then(
      (table) => {
        if (key === this._key) this._take(table);
      },
      (error) => {
        this.found.textContent = error.message;
      },
    );
    runs.wait(answered);
  }

  /** Mark the parameters that led at an incident of a run, and show its map. */
  lead(run, names) {
    this._leading = new Set(names);
    if (names.length) {
      this.runChoice.value = run.id;
      this.quantityChoice.value = GRADIENTS;
      this.search.value = "";
      this._mayMiss = names[0];
    }
    this.refresh();
    this._findMissed();
  }

  /** Search the parameter that led first, if it is not among those that are shown. */
  _findMissed() {
    const name = this._mayMiss;
    if (name === null || this._isAsking || !this.table) return;
    this._mayMiss = null;
    if (this.table.names.includes(name)) this.draw();
    else {
      this.search.value = name;
      this.refresh();
    }
  }

  draw() {
    if (this.table) {
      this.rows = grouped(this.table.names, (this.gutter - 12) / LETTER);
      this.height = Math.max(
        this.rows.reduce((sum, row) => sum + row.height, 0),
        HEADING,
      );
    }
    super.draw();
  }

  isNeeded() {
    return Boolean(this.run);
  }

  _take(table) {
    this.table = table;
    this._isAsking = false;
    this._colours = coloursOf(table.high);
    this.more.hidden = table.matching <= FEW;
    this.more.textContent =
      this._most === FEW
        ? `Show all ${whole(Math.min(table.matching, MOST))}`
        : `Show the ${FEW} largest`;
    this._say();
    this.draw();
    this._findMissed();
  }

  _showMore() {
    this._most = this._most === FEW ? MOST : FEW;
    this.refresh();
  }

  paint(context) {
    if (!this.table) return;
    const { area } = this;
    const { palette } = this.page;
    const width = Math.round(area.right - area.left);
    const [low, high] = this._colours;
    const image = this._image(width, low, high);
    this.drawn = {
      names: this.table.names,
      steps: this.table.steps,
      high: this.table.high,
      low,
      top: high,
    };
    context.imageSmoothingEnabled = false;
    context.textBaseline = "middle";
    let top = area.top;
    for (const row of this.rows) {
      const middle = top + row.height / 2;
      if (row.index === undefined) {
        context.font = `600 12px ${palette.font}`;
        context.textAlign = "left";
        context.fillStyle = palette.ink;
        context.fillText(fitted(context, row.text, area.right - 4), 2, middle + 1);
      } else {
        const isLeading = this._leading.has(this.table.names[row.index]);
        context.font = `${isLeading ? 700 : 400} 11px ${palette.font}`;
        context.textAlign = "right";
        context.fillStyle = isLeading ? palette.warning : palette.muted;
        context.fillText(
          (isLeading ? "▸ " : "") + fitted(context, row.text, area.left - 12),
          area.left - 7,
          middle,
        );
        context.drawImage(
          image,
          0,
          row.index,
          width,
          1,
          area.left,
          top + 0.5,
          width,
          row.height - 1,
        );
      }
      top += row.height;
    }
    line(context, area.left, area.bottom + 0.5, area.right, area.bottom + 0.5, palette.muted);
    this._showScale(low, high);
  }

  /** Return an image with a line for each parameter, of the highest value in each column of pixels. */
  _image(width, low, high) {
    const { names, steps, end, high: values, nonfinite } = this.table;
    const canvas = element("canvas", {
      width: Math.max(width, 1),
      height: Math.max(names.length, 1),
    });
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height);
    const gap = steps.length > 1 ? (steps[steps.length - 1] - steps[0]) / (steps.length - 1) : 1;
    const left = (column) =>
      this.x.at(column < steps.length ? steps[column] - 0.5 : (end ?? 0) + Math.max(gap / 2, 0.5));
    const spans = [...steps.keys()].map((column) => {
      const from = Math.max(Math.floor(left(column) - this.area.left), 0);
      return [
        from,
        Math.min(Math.max(Math.ceil(left(column + 1) - this.area.left), from + 1), width),
      ];
    });
    const warning = colourParts(this.page.palette.warning);
    for (let row = 0; row < names.length; row += 1) {
      const highest = new Float32Array(width).fill(NaN);
      const broken = new Uint8Array(width);
      spans.forEach(([from, to], column) => {
        const cell = row * steps.length + column;
        for (let pixel = from; pixel < to; pixel += 1) {
          if (!(highest[pixel] >= values[cell]))
            highest[pixel] = Number.isNaN(values[cell]) ? highest[pixel] : values[cell];
          broken[pixel] |= nonfinite[cell];
        }
      });
      for (let pixel = 0; pixel < width; pixel += 1) {
        if (!broken[pixel] && Number.isNaN(highest[pixel])) continue;
        const colour = broken[pixel]
          ? warning
          : heat((Math.log10(highest[pixel]) - low) / (high - low));
        image.data.set([...colour, 255], 4 * (row * canvas.width + pixel));
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  _showScale(low, high) {
    const isBroken = this.table.nonfinite.some((each) => each);
    refill(
      this.scaleBar,
      number(10 ** low, 2),
      element("span.ramp", { "aria-hidden": "true" }),
      number(10 ** high, 2),
      isBroken ? element("span.mark.warning", {}, " ■ not finite") : null,
    );
  }

  /** Say which cell is under the pointer. */
  _point(event) {
    if (!this.table || !this.area) return;
    let top = this.area.top;
    const row = this.rows.find((each) => (top += each.height) > event.offsetY);
    const { steps, names, high, nonfinite } = this.table;
    const column = firstNotBelow(steps, this.x.value(event.offsetX) + 0.5) - 1;
    if (row?.index === undefined || column < 0 || event.offsetX < this.area.left)
      return this._say();
    const cell = row.index * steps.length + column;
    const last = column + 1 < steps.length ? steps[column + 1] - 1 : this.table.end;
    const when =
      last > steps[column]
        ? `steps ${whole(steps[column])} to ${whole(last)}`
        : `step ${whole(steps[column])}`;
    const value = nonfinite[cell]
      ? "not finite"
      : Number.isNaN(high[cell])
        ? "not logged"
        : number(high[cell]);
    this.found.textContent = `${names[row.index]}: ${value} at ${when}`;
  }

  _say() {
    if (!this.table) return;
    const { matching, names } = this.table;
    const kept =
      names.length < matching
        ? `the ${whole(names.length)} largest of ${whole(matching)}`
        : whole(matching);
    this.found.textContent = matching
      ? `${kept} parameters, the largest first`
      : "No parameter has such a name.";
  }
}

/**
 * Return the rows of a map: a heading for each module, then its parameters, in the order of the names.
 *
 * @param names Names of the parameters, the largest first.
 * @param characters Letters for which there is room beside a row. Modules are those high up in the model if
 *   the rest of the names then fits, or each module would have a row or two.
 */
export function grouped(names, characters) {
  const parts = names.map((name) => name.split("."));
  let depth = Math.max(...parts.map((each) => each.length - 1), 0);
  while (depth > 1) {
    const modules = new Set(
      parts.map((each) => each.slice(0, Math.min(depth, each.length - 1)).join(".")),
    );
    const longest = Math.max(
      ...parts.map((each) => each.slice(Math.min(depth - 1, each.length - 1)).join(".").length),
    );
    if (modules.size * 3 <= names.length || longest > characters) break;
    depth -= 1;
  }
  const modules = new Map();
  parts.forEach((each, index) => {
    const cut = Math.min(depth, each.length - 1);
    const module = each.slice(0, cut).join(".");
    if (!modules.has(module)) modules.set(module, []);
    modules.get(module).push({ text: each.slice(cut).join("."), index, height: ROW });
  });
  return [...modules].flatMap(([module, rows]) => [
    ...(module || modules.size > 1 ? [{ text: module || "(no module)", height: HEADING }] : []),
    ...rows,
  ]);
}

/** Return the logarithms at which colours begin, at the first percentile, and end, at the largest value. */
function coloursOf(values) {
  const logarithms = values
    .filter((value) => value > 0)
    .map(Math.log10)
    .sort();
  if (!logarithms.length) return [-1, 1];
  const [low, high] = [
    logarithms[Math.floor(logarithms.length / 100)],
    logarithms[logarithms.length - 1],
  ];
  return high - low >= 0.2 ? [low, high] : [high - 0.2, high + 0.2];
}

/** Return a text that fits into a width, its beginning left out if it is too long. */
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let kept = text;
  while (kept && context.measureText(`…${kept}`).width > width) kept = kept.slice(1);
  return `…${kept}`;
}

function colourParts(colour) {
  const value = Number.parseInt(colour.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/** Offer options in a list and keep the one that is chosen. */
export function choices(select, options) {
  const key = JSON.stringify(options);
  if (select.dataset.options === key) return;
  select.dataset.options = key;
  const { value } = select;
  refill(
    select,
    options.map(([name, text]) =>
      element("option", { value: name, selected: name === value }, text),
    ),
  );
}
