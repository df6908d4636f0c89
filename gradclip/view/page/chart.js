// A chart over the steps: its canvas and axes, and what pointer and keys do in it.

import { element } from "./elements.js";
import { middleOf, stepsOf } from "./runs.js";
import { Scale, linearTicks, number, tickLabel, whole } from "./scales.js";

/** How charts are used. */
export const HELP =
  "Drag to zoom, drag with Shift to move, Ctrl and wheel to zoom, double-click for all steps. " +
  "Keys: left and right move the crosshair, + and − zoom, Page Up and Page Down move, 0 shows all steps.";
const MOST_PIXELS = 32000; // along a side of a canvas; browsers draw nothing in a larger one
const RIGHT = 14;
const AXIS = 24;
const [NARROW, WIDE] = [640, 900];

/**
 * A chart of which the horizontal axis has the steps; all charts have the same range of it.
 *
 * Subclasses paint their curves into `this.area` with `this.x`, and what lies over them.
 */
export class StepChart {
  /**
   * @param page The page, with its runs and palette.
   * @param title Title, also for screen readers.
   * @param height Height of the area of the curves in pixels.
   */
  constructor(page, title, height) {
    this.page = page;
    this.height = height;
    this.title = element("h2", {}, title);
    this.legend = element("ul.legend");
    this.head = element("div.head", {}, this.title, this.legend);
    this.canvas = element("canvas", { "aria-hidden": "true" });
    this.overlay = element("canvas.overlay", { "aria-hidden": "true" });
    this.frame = element(
      "div.frame",
      {
        role: "application",
        tabIndex: 0,
        "aria-label": `${title}, a chart over the steps. ${HELP}`,
      },
      this.canvas,
      this.overlay,
    );
    this.element = element("section.panel", {}, this.head, this.frame);
    this._listen();
  }

  /** Draw all. Subclasses say in `paint` how. */
  draw() {
    this.element.hidden = !this.isNeeded();
    if (this.element.hidden) return;
    const width = this.frame.clientWidth;
    const { gutter } = this;
    this.area = {
      left: gutter,
      right: Math.max(width - RIGHT, gutter + 20),
      top: 4,
      bottom: 4 + this.height,
    };
    const { first, last } = this.page.runs.range;
    this.x = new Scale(first, last, this.area.left, this.area.right);
    const context = sized(this.canvas, width, this.area.bottom + AXIS);
    this._drawSteps(context);
    context.save();
    this.paint(context);
    context.restore();
    this.drawOverlay();
  }

  /** Draw the crosshair, the selection, and what the subclass lays over its curves. */
  drawOverlay() {
    if (this.element.hidden || !this.area) return;
    const { area, x } = this;
    const { palette, runs } = this.page;
    const context = sized(this.overlay, this.frame.clientWidth, area.bottom + AXIS);
    context.save();
    context.beginPath();
    context.rect(area.left, area.top, area.right - area.left, area.bottom - area.top);
    context.clip();
    this.paintClipped(context);
    this.paintOver(context);
    context.restore();
    if (runs.step !== null && runs.step >= x.low && runs.step <= x.high) {
      const at = Math.round(x.at(runs.step)) + 0.5;
      line(context, at, area.top, at, area.bottom, palette.muted, [3, 3]);
    }
    if (this._selection) {
      const [from, to] = this._selection;
      context.fillStyle = palette.accent;
      context.globalAlpha = 0.18;
      context.fillRect(Math.min(from, to), area.top, Math.abs(to - from), area.bottom - area.top);
    }
  }

  isNeeded() {
    return true;
  }

  /** The room on the left for labels, in pixels; the same for all charts. */
  get gutter() {
    const width = this.frame.clientWidth;
    return width < NARROW ? 54 : width < WIDE ? 92 : 126;
  }

  paintOver() {}

  /** Mark the steps that the threshold which is tried would have clipped. */
  paintClipped(context) {
    const { runs, palette } = this.page;
    if (runs.threshold === null) return;
    const { shown } = runs;
    const lane = Math.max(2, Math.min(5, 30 / shown.length));
    shown.forEach((run, index) => {
      const bottom = this.area.bottom - index * (lane + 1);
      for (const [from, to] of clippedSpans(run.series, runs.threshold, this.x)) {
        context.globalAlpha = 0.13 / Math.sqrt(shown.length);
        context.fillStyle = palette.warning;
        context.fillRect(from, this.area.top, to - from, this.area.bottom - this.area.top);
        context.globalAlpha = 1;
        context.fillStyle = shown.length > 1 ? run.colour : palette.warning;
        context.fillRect(from, bottom - lane, to - from, lane);
      }
    });
  }

  /** Draw the axis of the steps and the frame. */
  _drawSteps(context) {
    const { area, x } = this;
    const { palette } = this.page;
    const labelWidth = Math.max(whole(x.high).length * 7 + 26, 70);
    const most = Math.max(Math.floor((area.right - area.left) / labelWidth), 1);
    context.font = `12px ${palette.font}`;
    context.textBaseline = "top";
    context.textAlign = "center";
    for (const step of linearTicks(x.low, x.high, most, 1)) {
      const at = Math.round(x.at(step)) + 0.5;
      line(context, at, area.top, at, area.bottom, palette.grid);
      context.fillStyle = palette.muted;
      const label = whole(step);
      const half = context.measureText(label).width / 2;
      context.fillText(label, Math.min(at, this.frame.clientWidth - half - 1), area.bottom + 7);
    }
    line(context, area.left, area.bottom + 0.5, area.right, area.bottom + 0.5, palette.muted);
  }

  /** Draw an axis of values with its labels, at round values. */
  drawValues(
    context,
    scale,
    label = scale.logarithmic ? tickLabel : number,
    most = Math.max(2, Math.floor(this.height / 34)),
  ) {
    const { area } = this;
    const { palette } = this.page;
    context.font = `12px ${palette.font}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (const value of scale.ticks(most)) {
      const at = Math.round(scale.at(value)) + 0.5;
      line(context, area.left, at, area.right, at, palette.grid);
      context.fillStyle = palette.muted;
      context.fillText(label(value), area.left - 7, at);
    }
  }

  _listen() {
    const { frame } = this;
    const { runs } = this.page;
    const pointers = new Map();
    const inside = (event) => Math.min(Math.max(event.offsetX, this.area.left), this.area.right);
    let mode = null;
    frame.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this.area) return;
      pointers.set(event.pointerId, inside(event));
      // A finger moves the steps and two zoom, as on a map; the mouse selects what to show.
      mode = event.pointerType === "touch" || event.shiftKey ? "pan" : "select";
      this._selection = mode === "select" ? [inside(event), inside(event)] : null;
      frame.setPointerCapture(event.pointerId);
    });
    frame.addEventListener("pointermove", (event) => {
      if (!this.area) return;
      const at = inside(event);
      const before = pointers.get(event.pointerId);
      if (before === undefined) runs.setStep(this._snapped(this.x.value(at)));
      else if (mode === "select") this._selection[1] = at;
      else if (mode === "pan" && pointers.size === 1)
        runs.pan((before - at) / (this.area.right - this.area.left));
      else if (pointers.size === 2) this._pinch(pointers, event.pointerId, at);
      if (before !== undefined) pointers.set(event.pointerId, at);
      if (this._selection) this.drawOverlay();
    });
    const end = (event) => {
      pointers.delete(event.pointerId);
      const [from, to] = this._selection ?? [0, 0];
      this._selection = null;
      if (Math.abs(to - from) > 4)
        runs.show(...[this.x.value(from), this.x.value(to)].sort((a, b) => a - b));
      else if (this.area && event.type === "pointerup")
        runs.setStep(this._snapped(this.x.value(inside(event))));
      this.drawOverlay();
    };
    frame.addEventListener("pointerup", end);
    frame.addEventListener("pointercancel", end);
    frame.addEventListener("pointerleave", () => {
      if (!pointers.size) runs.setStep(null);
    });
    frame.addEventListener("dblclick", () => runs.showWhole());
    frame.addEventListener("wheel", (event) => this._wheel(event), { passive: false });
    frame.addEventListener("keydown", (event) => this._key(event));
  }

  _pinch(pointers, moved, at) {
    const [[, other]] = [...pointers].filter(([id]) => id !== moved);
    const before = Math.max(Math.abs(pointers.get(moved) - other), 10);
    this.page.runs.zoom(
      before / Math.max(Math.abs(at - other), 10),
      this.x.value((at + other) / 2),
    );
  }

  _wheel(event) {
    const { runs } = this.page;
    const isSideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
    if (!event.ctrlKey && !event.metaKey && !isSideways) return; // it scrolls the page
    event.preventDefault();
    if (isSideways) runs.pan((event.deltaX || event.deltaY) / (this.area.right - this.area.left));
    else runs.zoom(1.002 ** event.deltaY, this.x.value(event.offsetX));
  }

  _key(event) {
    const { runs } = this.page;
    const actions = {
      ArrowLeft: () => this._moveStep(event.shiftKey ? -10 : -1),
      ArrowRight: () => this._moveStep(event.shiftKey ? 10 : 1),
      Home: () => this._putStep(runs.range.first),
      End: () => this._putStep(runs.range.last),
      PageUp: () => runs.pan(-0.5),
      PageDown: () => runs.pan(0.5),
      "+": () => runs.zoom(0.5, runs.step ?? undefined),
      "=": () => runs.zoom(0.5, runs.step ?? undefined),
      "-": () => runs.zoom(2, runs.step ?? undefined),
      0: () => runs.showWhole(),
      Escape: () => runs.setStep(null),
    };
    if (event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }

  /** Move the crosshair by some buckets of the first run, and the range with it. */
  _moveStep(distance) {
    const { runs } = this.page;
    const series = runs.shown[0]?.series;
    if (!series?.steps.length) return;
    const { first, last } = runs.range;
    const from = runs.step ?? (distance > 0 ? first : last);
    const here = [...series.steps.keys()].reduce((best, index) =>
      Math.abs(middleOf(series, index) - from) < Math.abs(middleOf(series, best) - from)
        ? index
        : best,
    );
    const index = Math.min(
      Math.max(here + (runs.step === null ? 0 : distance), 0),
      series.steps.length - 1,
    );
    const step = middleOf(series, index);
    if (step < first || step > last) runs.pan(step < first ? -0.25 : 0.25);
    this._putStep(step);
  }

  _putStep(step) {
    this.page.runs.setStep(this._snapped(step));
    this.page.announce();
  }

  /** Return the step of the bucket of a run that is nearest. */
  _snapped(step) {
    const steps = this.page.runs.shown
      .map((run) => run.numbersAt(step))
      .filter((each) => each !== null)
      .map(({ first, last }) => Math.min(Math.max(step, first), last));
    if (!steps.length) return Math.round(step);
    return Math.round(
      steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best)),
    );
  }
}

/**
 * Return the curve of a column with one entry for each column of pixels that has a value: where it is,
 * its first and last step, its smallest and largest value, and whether no line leads to it from the entry
 * before, because numbers that were not finite or a gap in the log lie between. No bucket is left out.
 */
export function envelope(series, { low, high }, x) {
  const columns = { at: [], first: [], last: [], low: [], high: [], isBroken: [] };
  let isBroken = true;
  let pixel = NaN;
  for (let index = 0; index < series.steps.length; index += 1) {
    isBroken ||= series.steps[index] in series.gaps;
    if (Number.isNaN(high[index])) {
      isBroken = true;
      continue;
    }
    const [first, last] = stepsOf(series, index);
    const at = Math.round(2 * x.at((first + last) / 2)) / 2;
    const end = columns.at.length - 1;
    if (at === pixel) {
      columns.last[end] = last;
      columns.low[end] = Math.min(columns.low[end], low[index]);
      columns.high[end] = Math.max(columns.high[end], high[index]);
    } else {
      pixel = at;
      columns.at.push(at);
      columns.first.push(first);
      columns.last.push(last);
      columns.low.push(low[index]);
      columns.high.push(high[index]);
      columns.isBroken.push(isBroken);
    }
    isBroken = false;
  }
  return columns;
}

/** Draw a curve through the smallest and the largest value of each column; lone values become points. */
export function drawCurve(context, columns, y, { colour, width, dash = [], alpha = 1 }) {
  const count = columns.at.length;
  context.save();
  Object.assign(context, {
    strokeStyle: colour,
    fillStyle: colour,
    lineWidth: width,
    globalAlpha: alpha,
    lineJoin: "round",
  });
  context.setLineDash(dash);
  context.beginPath();
  const radius = 2.5 + width / 2;
  const points = [];
  let before = 0;
  for (let index = 0; index < count; index += 1) {
    const at = columns.at[index];
    const [high, low] = [y.at(columns.high[index]), y.at(columns.low[index])];
    // The nearer end first, so that the curve does not cross the column twice.
    const [near, far] =
      Math.abs(high - before) <= Math.abs(low - before) ? [high, low] : [low, high];
    if (columns.isBroken[index]) context.moveTo(at, near);
    else context.lineTo(at, near);
    if (far !== near) context.lineTo(at, far);
    before = far;
    const isLone =
      columns.isBroken[index] &&
      (index + 1 === count || columns.isBroken[index + 1]) &&
      Math.abs(far - near) < 2 * radius; // a taller column is in sight by itself
    if (isLone && dash.length) {
      // A dash on each side of a point below it, which stays in sight.
      context.moveTo(at - 8, far);
      context.lineTo(at + 8, far);
    } else if (isLone) points.push([at, far]);
  }
  context.stroke();
  context.beginPath();
  for (const [at, height] of points) {
    context.moveTo(at + radius, height);
    context.arc(at, height, radius, 0, 2 * Math.PI);
  }
  context.fill();
  context.restore();
}

/** Yield spans of pixels with buckets in which a norm is above a threshold, joined where they touch. */
export function* clippedSpans(series, threshold, x) {
  const highest = series?.columns.norm?.high;
  if (!highest) return;
  let [from, to] = [NaN, NaN];
  for (let index = 0; index < series.steps.length; index += 1) {
    if (!(highest[index] > threshold)) continue;
    const [first, last] = stepsOf(series, index);
    const [begin, end] = [x.at(first - 0.5), x.at(last + 0.5)];
    const middle = (begin + end) / 2;
    const [left, right] = [Math.min(begin, middle - 0.75), Math.max(end, middle + 0.75)];
    if (left <= to + 0.5) to = right;
    else {
      if (to > from) yield [from, to];
      [from, to] = [left, right];
    }
  }
  if (to > from) yield [from, to];
}

/** Return the context of a canvas of a size in the page's pixels, empty, at the screen's resolution. */
export function sized(canvas, width, height) {
  const isPrinting = document.documentElement.hasAttribute("data-printing");
  const wanted = Math.max(window.devicePixelRatio || 1, isPrinting ? 3 : 1);
  const ratio = Math.min(wanted, MOST_PIXELS / Math.max(width, height));
  const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== wide || canvas.height !== high) [canvas.width, canvas.height] = [wide, high];
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Draw a straight line, one pixel wide. */
export function line(context, x0, y0, x1, y1, colour, dash = []) {
  context.save();
  Object.assign(context, { strokeStyle: colour, lineWidth: 1 });
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(x0, y0);
  context.lineTo(x1, y1);
  context.stroke();
  context.restore();
}
