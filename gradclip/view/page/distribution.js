// The distribution of the norms, with a threshold that one drags.

import { line, sized } from "./chart.js";
import { element, refill } from "./elements.js";
import { Scale, number, percent, tickLabel, whole } from "./scales.js";
import { swatch } from "./styles.js";

const PER_DECADE = 900; // thresholds have three digits: 1.00, 1.01, ... 9.99
const HEIGHT = 190;
const AXIS = 24;
const BINS = 90;
const [LEAST, MOST] = [1e-320, 1.79e308]; // thresholds of three digits that are numbers
/** How many norms of a run lie above each threshold of three digits. */
class Counts {
  constructor(run) {
    const { decade, finite, zeros } = run.overview.distribution;
    Object.assign(this, { run, decade, finite, above: run.above, positive: finite - zeros });
  }

  /** Return how many norms are above a threshold of three digits. */
  aboveOf(threshold) {
    const index = placeOf(threshold) - this.decade * PER_DECADE;
    if (index < 0) return this.positive; // the smallest norm may be the first threshold itself
    return index < this.above.length ? this.above[index] : 0;
  }
}

/** Return the place of a threshold of three digits among all of them; that of 1.00 is 0. */
function placeOf(threshold) {
  const [digits, exponent] = threshold.toExponential(2).split("e");
  return Number(exponent) * PER_DECADE + Math.round(Number(digits) * 100) - 100;
}

/** Return the threshold of three digits at a place. */
function thresholdAt(place) {
  const decade = Math.floor(place / PER_DECADE);
  return Number(`${100 + place - decade * PER_DECADE}e${decade - 2}`);
}

/** The panel of the distribution. */
export class Distribution {
  constructor(page) {
    this.page = page;
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.frame = element("div.frame.grabbable", {}, this.canvas);
    this.slider = element("input", {
      type: "range",
      step: 1,
      "aria-label": "Threshold to try",
      input: () => this._try(thresholdAt(Number(this.slider.value))),
    });
    this.field = element("input", {
      type: "text",
      inputMode: "decimal",
      size: 8,
      "aria-label": "Threshold to try, as a number",
      change: () => this._typed(),
    });
    this.clear = element(
      "button.quiet",
      { type: "button", click: () => page.runs.setThreshold(null) },
      "Clear",
    );
    this.shares = element("ul.shares");
    this.element = element(
      "section.panel",
      {},
      element(
        "div.head",
        {},
        element("h2", {}, "Try a threshold"),
        element("p.hint", {}, "Drag the line, or type a number."),
      ),
      this.frame,
      element(
        "div.trial",
        {},
        this.slider,
        element("label", {}, "threshold ", this.field),
        this.clear,
      ),
      element("div", { role: "status" }, this.shares),
    );
    this._listen();
  }

  get _shown() {
    return this.page.runs.shown.filter((run) => run.above).map((run) => new Counts(run));
  }

  /** The first advice with a number that fits, until a threshold is tried. */
  get _advice() {
    const { shown, threshold } = this.page.runs;
    if (threshold !== null) return undefined;
    return shown.map((run) => run.overview.advice).find((advice) => advice.threshold !== null);
  }

  /** The threshold that is tried, or before one is, that which fits a run by the report. */
  get threshold() {
    return (
      this.page.runs.threshold ??
      this._advice?.threshold ??
      (this._bounds ? thresholdAt(Math.round((this._bounds[0] + this._bounds[1]) / 2)) : 1)
    );
  }

  draw() {
    const shown = this._shown;
    this.element.hidden = !shown.length;
    if (!shown.length) return;
    this._bounds = boundsOf(
      shown,
      this.page.runs.shown.map((run) => run.overview.advice.threshold),
    );
    const { palette } = this.page;
    const width = this.frame.clientWidth;
    const context = sized(this.canvas, width, HEIGHT + AXIS);
    const gutter = 46;
    const [low, high] = this._bounds.map(thresholdAt);
    this.x = new Scale(low, high, gutter, width - 14, true);
    const bins = binsOf(this._bounds);
    const heights = shown.map((counts) =>
      bins
        .slice(1)
        .map(
          (bin, index) =>
            counts.aboveOf(thresholdAt(bins[index])) - counts.aboveOf(thresholdAt(bin)),
        ),
    );
    const most = Math.max(...heights.flat(), 2);
    const y = new Scale(0.5, most * 1.5, HEIGHT, 20, true);
    this._drawAxes(context, y, most);
    shown.forEach((counts, index) =>
      this._drawSteps(
        context,
        y,
        bins,
        heights[index],
        shown.length > 1 ? counts.run.colour : palette.before,
      ),
    );
    this._drawAdvice(context);
    this._drawThreshold(context);
    this.drawn = { edges: bins.map(thresholdAt), heights };
    this._say();
  }

  _drawAxes(context, y, most) {
    const { palette } = this.page;
    context.font = `12px ${palette.font}`;
    context.textAlign = "center";
    context.textBaseline = "top";
    for (const value of this.x.ticks(Math.floor((this.x.end - this.x.start) / 62))) {
      const at = Math.round(this.x.at(value)) + 0.5;
      line(context, at, 20, at, HEIGHT, palette.grid);
      context.fillStyle = palette.muted;
      context.fillText(tickLabel(value), at, HEIGHT + 7);
    }
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const count of y.ticks(4).filter((each) => each >= 1 && each <= most * 1.2)) {
      const at = Math.round(y.at(count)) + 0.5;
      line(context, this.x.start, at, this.x.end, at, palette.grid);
      context.fillStyle = palette.muted;
      context.fillText(tickLabel(count), this.x.start - 7, at);
    }
    line(context, this.x.start, HEIGHT + 0.5, this.x.end, HEIGHT + 0.5, palette.muted);
  }

  /** Draw the number of steps in each bin; the part above the threshold stands out. */
  _drawSteps(context, y, bins, heights, colour) {
    const trace = () => {
      context.beginPath();
      context.moveTo(this.x.at(thresholdAt(bins[0])), HEIGHT);
      heights.forEach((height, index) => {
        const top = height ? y.at(height) : HEIGHT;
        context.lineTo(this.x.at(thresholdAt(bins[index])), top);
        context.lineTo(this.x.at(thresholdAt(bins[index + 1])), top);
      });
      context.lineTo(this.x.at(thresholdAt(bins[bins.length - 1])), HEIGHT);
    };
    const at = this.x.at(this.threshold);
    for (const [from, to, alpha] of [
      [this.x.start, at, 0.28],
      [at, this.x.end, 0.75],
    ]) {
      context.save();
      context.beginPath();
      context.rect(from, 0, Math.max(to - from, 0), HEIGHT);
      context.clip();
      trace();
      Object.assign(context, {
        fillStyle: colour,
        globalAlpha: alpha / Math.sqrt(this._shown.length),
      });
      context.fill();
      context.restore();
    }
    trace();
    Object.assign(context, { strokeStyle: colour, lineWidth: 1.25 });
    context.stroke();
  }

  _drawAdvice(context) {
    const { palette, runs } = this.page;
    for (const run of runs.shown) {
      const { threshold } = run.overview.advice;
      if (threshold === null) continue;
      const at = this.x.at(threshold);
      line(context, at, 20, at, HEIGHT, runs.shown.length > 1 ? run.colour : palette.ink, [2, 3]);
      context.fillStyle = runs.shown.length > 1 ? run.colour : palette.ink;
      context.beginPath();
      context.moveTo(at - 4.5, HEIGHT + 6);
      context.lineTo(at + 4.5, HEIGHT + 6);
      context.lineTo(at, HEIGHT);
      context.fill();
    }
  }

  _drawThreshold(context) {
    const { palette } = this.page;
    const at = this.x.at(this.threshold);
    context.fillStyle = palette.warning;
    context.fillRect(at - 1, 18, 2, HEIGHT - 18);
    context.beginPath();
    context.roundRect(at - 5, 16, 10, 18, 3);
    context.fill();
    const advice = this._advice;
    const word = advice && (advice.max_norm === advice.threshold ? "advised: " : "if fixed: ");
    const label = `${word ?? ""}${number(this.threshold)}`;
    context.font = `600 12px ${palette.font}`;
    context.textBaseline = "bottom";
    context.textAlign = "center";
    const half = context.measureText(label).width / 2;
    context.fillText(label, Math.min(Math.max(at, this.x.start + half), this.x.end - half), 14);
  }

  /** Say what share of the steps the threshold would have clipped. */
  _say() {
    const { runs } = this.page;
    const { threshold } = this;
    [this.slider.min, this.slider.max] = this._bounds;
    this.slider.value = placeOf(threshold);
    if (document.activeElement !== this.field) this.field.value = number(threshold);
    this.clear.hidden = runs.threshold === null;
    const sentences = this._shown.map((counts) => {
      const above = counts.aboveOf(threshold);
      return [
        counts.run,
        `${percent(above / counts.finite)} of the steps (${whole(above)} of ${whole(counts.finite)})`,
      ];
    });
    this.slider.setAttribute(
      "aria-valuetext",
      `${number(threshold)}: ${sentences.map(([, text]) => text).join("; ")}`,
    );
    const isTried = runs.threshold !== null;
    const words = `${number(threshold)} would have clipped`;
    if (sentences.length === 1) {
      const marked = isTried ? ", those that are marked in all panels." : ".";
      const [[, text]] = sentences;
      refill(this.shares, element("li", {}, `${words} `, element("strong", {}, text), marked));
      return;
    }
    const marked = isTried ? " the steps that are marked in all panels" : "";
    refill(
      this.shares,
      element("li", {}, `${words}${marked}:`),
      sentences.map(([run, text]) =>
        element(
          "li",
          {},
          swatch(run),
          element("span.name", { title: run.name }, `${run.shortName}: `),
          element("strong", {}, text),
        ),
      ),
    );
  }

  _try(threshold) {
    this.page.runs.setThreshold(Number(threshold.toPrecision(3)));
  }

  _typed() {
    const typed = Number(this.field.value.replace(",", "."));
    if (Number.isFinite(typed) && typed > 0) this._try(typed);
    this.field.value = number(this.threshold);
  }

  _listen() {
    const drag = (event) =>
      this._try(this.x.value(Math.min(Math.max(event.offsetX, this.x.start), this.x.end)));
    this.frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.frame.setPointerCapture(event.pointerId);
      drag(event);
    });
    this.frame.addEventListener("pointermove", (event) => {
      if (this.frame.hasPointerCapture(event.pointerId)) drag(event);
    });
  }
}

/** Return the places at which the axis begins and ends: around all norms and thresholds that fit. */
function boundsOf(shown, thresholds) {
  const places = thresholds.filter((each) => each !== null).map(placeOf);
  for (const { decade, above, positive } of shown) {
    // Norms begin in front of the first threshold that is not below all of them.
    const first = above.findIndex((count) => count < positive);
    const last = above.findIndex((count) => count === 0);
    places.push(
      decade * PER_DECADE + Math.max(first - 1, 0),
      decade * PER_DECADE + (last < 0 ? above.length - 1 : last),
    );
  }
  const room = (place, factor) =>
    placeOf(Math.min(Math.max(thresholdAt(place) * factor, LEAST), MOST));
  const [low, high] = [Math.min(...places), Math.max(...places)];
  const wide =
    1.05 *
    10 ** (0.06 * Math.log10(thresholdAt(high)) - 0.06 * Math.log10(thresholdAt(low) || LEAST));
  return [room(low, 1 / wide), room(high, wide)];
}

/** Return the places of the edges of bins that are about equally wide on the axis. */
function binsOf([low, high]) {
  const scale = new Scale(thresholdAt(low), thresholdAt(high), 0, BINS, true);
  const edges = Array.from({ length: BINS + 1 }, (_, index) => placeOf(scale.value(index)));
  return [...new Set(edges)];
}
