// The numbers of the range as tables, for those who do not see the charts.

import { element, refill } from "./elements.js";
import { stepsOf } from "./runs.js";
import { between, number, whole } from "./scales.js";
import { swatch } from "./styles.js";

const ROWS = 50;

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
