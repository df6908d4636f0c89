// The charts of curves: norms with their threshold, losses, and the share of clipped steps.

import { StepChart, drawCurve, envelope } from "./chart.js";
import { element, refill } from "./elements.js";
import { middleOf } from "./runs.js";
import { Scale, number, percent, whole } from "./scales.js";
import { drawMarker } from "./styles.js";

const NEAR = 1e3; // a threshold this many times beyond the norms does not stretch their axis
const BETWEEN_MARKERS = 160;

/** A chart of curves: subclasses list them, and the marks at single steps. */
class CurveChart extends StepChart {
  /** What was drawn, for tests: of each curve its columns of pixels, as `envelope` returns them. */
  drawn = [];

  isNeeded() {
    return this.curves().some(({ column }) => column !== undefined);
  }

  paint(context) {
    const { area } = this;
    this.drawn = this.curves()
      .filter(({ column, isNeeded = true }) => column !== undefined && isNeeded)
      .map((curve) => ({ ...curve, columns: envelope(curve.series, curve.column, this.x) }));
    const visible = this.drawn.map((curve) => ({
      ...curve,
      extremes: extremesIn(curve.columns, this.x),
    }));
    const y = this.scaleOf(visible);
    this.drawValues(context, y, this.label);
    context.beginPath();
    context.rect(area.left, area.top - 4, area.right - area.left, area.bottom - area.top + 4);
    context.clip();
    const { focus } = this.page.runs;
    const isBehind = ({ run }) => focus !== null && run !== focus;
    const inOrder = [
      ...this.drawn.filter(isBehind),
      ...this.drawn.filter((curve) => !isBehind(curve)),
    ];
    for (const curve of inOrder) {
      const alpha = (curve.style.alpha ?? 1) * (isBehind(curve) ? 0.15 : 1);
      drawCurve(context, this.visiblePart(curve), y, { ...curve.style, alpha });
    }
    if (this.page.runs.shown.length > 1) this._drawMarkers(context, y);
    this._drawMarks(context);
    this._showLegend(visible);
    this.y = y;
  }

  /** Return the columns of a curve that are painted. */
  visiblePart(curve) {
    return curve.columns;
  }

  /** Draw the markers of the runs along their first curve, at distances. */
  _drawMarkers(context, y) {
    const { focus } = this.page.runs;
    for (const { run, columns, hasMarkers } of this.drawn) {
      if (!hasMarkers || (focus !== null && run !== focus)) continue;
      context.fillStyle = run.colour;
      const shift = (this.page.runs.shown.indexOf(run) + 0.5) / this.page.runs.shown.length;
      let next = this.area.left + shift * BETWEEN_MARKERS;
      columns.at.forEach((at, index) => {
        if (at < next) return;
        drawMarker(context, run.marker, at, y.at(columns.high[index]), 8);
        next = at + BETWEEN_MARKERS;
      });
    }
  }

  _drawMarks(context) {
    const { palette } = this.page;
    const several = this.page.runs.shown.length > 1;
    for (const { run, count, name, height } of this.marks()) {
      if (!count) continue;
      const at = this.area.top + height;
      context.fillStyle = context.strokeStyle = several ? run.colour : palette[name];
      let before = -Infinity;
      for (let index = 0; index < count.length; index += 1) {
        if (!count[index]) continue;
        const x = this.x.at(middleOf(run.series, index));
        if (x < before + 3) continue; // marks this near look like one
        before = x;
        if (name === "warning") drawCross(context, x, at);
        else drawTriangle(context, x, at);
      }
    }
  }

  _showLegend(visible) {
    const several = this.page.runs.shown.length > 1;
    const kinds = new Map();
    for (const curve of visible) {
      if (!kinds.has(curve.label)) kinds.set(curve.label, curve);
    }
    const lines = [...kinds].map(([label, { style, hint }]) =>
      element(
        "li",
        {},
        lineSample(style, several ? this.page.palette.ink : style.colour),
        label + (hint?.(visible) ?? ""),
      ),
    );
    const marks = new Map();
    for (const { count, name, label } of this.marks()) {
      const [, total] = marks.get(label) ?? [name, 0];
      marks.set(label, [name, total + (count ? count.reduce((sum, each) => sum + each, 0) : 0)]);
    }
    const shown = [...marks]
      .filter(([, [, total]]) => total > 0)
      .map(([label, [name, total]]) =>
        element(
          "li",
          {},
          element(`span.mark.${name}`, { "aria-hidden": "true" }, name === "warning" ? "✕" : "▼"),
          `${label} (${whole(total)})`,
        ),
      );
    refill(this.legend, lines, shown);
  }
}

/** Norms before and after clipping, and the threshold. */
export class NormChart extends CurveChart {
  constructor(page) {
    super(page, "Gradient norm", 280);
  }

  curves() {
    const { shown } = this.page.runs;
    const { palette } = this.page;
    const several = shown.length > 1;
    const ofRun = (run, name, label, style, more = {}) => ({
      run,
      series: run.series,
      name,
      column: run.series?.columns[name],
      label,
      style,
      ...more,
    });
    // The bold curve lies below: where nothing was clipped it surrounds the thin one.
    return [
      ...shown.map((run) =>
        ofRun(
          run,
          "clipped_norm",
          "after clipping",
          {
            colour: several ? run.colour : palette.after,
            width: 3,
            alpha: several ? 0.55 : 0.85,
          },
          { isNeeded: isClipped(run.series) },
        ),
      ),
      ...shown.map((run) =>
        ofRun(
          run,
          "norm",
          "before clipping",
          {
            colour: several ? run.colour : palette.before,
            width: 1,
            alpha: several ? 0.8 : 1,
          },
          { hasMarkers: true },
        ),
      ),
      ...shown.map((run) =>
        ofRun(
          run,
          "threshold",
          "threshold",
          {
            colour: several ? run.colour : palette.ink,
            width: 1.5,
            dash: [6, 4],
          },
          { hint: (curves) => this._whereThresholdsAre(curves) },
        ),
      ),
    ];
  }

  /**
   * Of norms before clipping, leave to the curve after clipping what lies under it where single steps are
   * not told apart: else a long run would be one block of colour.
   */
  visiblePart({ run, name, columns }) {
    const after =
      name === "norm" &&
      this.drawn.find((curve) => curve.run === run && curve.name === "clipped_norm");
    if (!after) return columns;
    const clipped = new Map(after.columns.at.map((at, index) => [at, after.columns.high[index]]));
    const low = columns.low.map((value, index) => {
      const [reduced, high] = [clipped.get(columns.at[index]), columns.high[index]];
      return value < high && reduced < high ? Math.max(value, reduced) : value;
    });
    return { ...columns, low };
  }

  marks() {
    return this.page.runs.shown.flatMap((run) => [
      { run, count: run.series?.counts.nonfinite, name: "warning", label: "not finite", height: 8 },
      { run, count: run.series?.counts.skipped, name: "skipped", label: "skipped", height: 20 },
    ]);
  }

  scaleOf(visible) {
    const norms = visible
      .filter(({ name }) => name !== "threshold")
      .flatMap(({ extremes }) => extremes);
    const { isLogarithmic } = this.page.runs;
    const usable = norms.filter((value) => Number.isFinite(value) && (!isLogarithmic || value > 0));
    let [low, high] = usable.length ? [Math.min(...usable), Math.max(...usable)] : [0.1, 10];
    for (const { name, extremes } of visible) {
      if (name !== "threshold") continue;
      const near = extremes.filter((value) => value > low / NEAR && value < high * NEAR);
      [low, high] = [Math.min(low, ...near), Math.max(high, ...near)];
    }
    const { top, bottom } = this.area;
    const hasMarks = this.marks().some(({ count }) => count?.some((each) => each > 0));
    const head = hasMarks ? 30 : 8;
    if (!isLogarithmic) return new Scale(Math.min(low, 0), high || 1, bottom, top + head);
    const room = Math.max((Math.log10(high) - Math.log10(low)) * 0.06, 0.03);
    return new Scale(low / 10 ** room, high * 10 ** (room / 2), bottom, top + head, true);
  }

  /** Say of thresholds that lie outside of the picture that they do. */
  _whereThresholdsAre(visible) {
    const values = visible
      .filter(({ name }) => name === "threshold")
      .flatMap(({ extremes }) => extremes);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const text = low === high ? ` ${number(low)}` : "";
    const y = this.scaleOf(visible);
    if (low > y.high) return `${text} (above)`;
    return high < y.low ? `${text} (below)` : text;
  }

  paintOver(context) {
    const { runs, palette } = this.page;
    if (runs.threshold === null || !this.y) return;
    const at = this.y.at(runs.threshold);
    Object.assign(context, { strokeStyle: palette.warning, lineWidth: 1.5 });
    context.setLineDash([]);
    context.beginPath();
    context.moveTo(this.area.left, at);
    context.lineTo(this.area.right, at);
    context.stroke();
    context.font = `600 12px ${palette.font}`;
    context.fillStyle = palette.warning;
    context.textBaseline = at - this.area.top > 18 ? "bottom" : "top";
    context.textAlign = "right";
    context.fillText(
      `tried: ${number(runs.threshold)}`,
      this.area.right - 4,
      at + (at - this.area.top > 18 ? -2 : 3),
    );
  }
}

/** Losses: those that the clipper logged, or another scalar of the run. */
export class LossChart extends CurveChart {
  constructor(page) {
    super(page, "Loss", 150);
    this.choice = element("label.choice", { hidden: true });
    this.title.after(this.choice);
  }

  draw() {
    this._offerTags();
    this.frame.hidden = !super.isNeeded();
    super.draw();
  }

  isNeeded() {
    return super.isNeeded() || !this.choice.hidden;
  }

  curves() {
    const { shown } = this.page.runs;
    return shown
      .filter((run) => run.lossCurve)
      .map((run) => {
        const [series, name] = run.lossCurve;
        const colour = shown.length > 1 ? run.colour : this.page.palette.before;
        const label = run.lossTag ?? "loss";
        return {
          run,
          series,
          name,
          column: series.columns[name],
          label,
          style: { colour, width: 1.5 },
          hasMarkers: true,
        };
      });
  }

  marks() {
    return this.page.runs.shown
      .filter((run) => run.lossTag === null)
      .map((run) => ({
        run,
        count: run.series?.counts.loss_nonfinite,
        name: "warning",
        label: "not finite",
        height: 8,
      }));
  }

  scaleOf(visible) {
    const values = visible.flatMap(({ extremes }) => extremes);
    const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const { top, bottom } = this.area;
    const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
    // Losses far apart need a logarithmic axis, or a spike would flatten all others.
    const isFar = this.page.runs.isLogarithmic && low > 0 && high / low > 4;
    if (isFar) return new Scale(low / 1.1, high * 1.1, bottom, top + 14, true);
    return new Scale(low - room, high + room, bottom, top + 6);
  }

  /** Offer the scalars of the runs as losses, where there are any. */
  _offerTags() {
    const { shown } = this.page.runs;
    const tags = [...new Set(shown.flatMap((run) => run.overview.scalars))].sort();
    this.choice.hidden = !tags.length;
    if (this._tags === tags.join("\n")) return;
    this._tags = tags.join("\n");
    const own = shown.some((run) => run.overview.summary.losses !== null)
      ? "logged with the norms"
      : "none";
    const chosen = shown.map((run) => run.lossTag).find((tag) => tag !== null) ?? own;
    const select = element(
      "select",
      {},
      [own, ...tags].map((tag) => element("option", { value: tag, selected: tag === chosen }, tag)),
    );
    select.addEventListener("change", () => {
      const tag = select.selectedIndex ? tags[select.selectedIndex - 1] : null;
      for (const run of this.page.runs.all) {
        if (run.overview)
          this.page.runs.setLossTag(run, run.overview.scalars.includes(tag) ? tag : null);
      }
    });
    refill(this.choice, "Curve: ", select);
  }
}

/** The share of clipped steps over a window. */
export class ClipRateChart extends CurveChart {
  label = (value) => percent(value);

  constructor(page) {
    super(page, "Clipped steps", 90);
  }

  curves() {
    const { shown } = this.page.runs;
    const sizes = shown.map((run) => run.overview.clip_rate_window);
    const windows = [...new Set([Math.min(...sizes), Math.max(...sizes)])].map(whole).join(" to ");
    return shown.map((run) => ({
      run,
      series: run.series,
      name: "clip_rate",
      column: run.series?.columns.clip_rate,
      label: `share of the last ${windows === "1" ? "step" : `${windows} steps`}`,
      style: { colour: shown.length > 1 ? run.colour : this.page.palette.before, width: 1.5 },
      hasMarkers: true,
    }));
  }

  marks() {
    return [];
  }

  scaleOf() {
    return new Scale(-0.04, 1.04, this.area.bottom, this.area.top);
  }
}

/** Tell whether any norm of a range was changed. */
function isClipped(series) {
  const { norm, clipped_norm: after } = series?.columns ?? {};
  if (!norm || !after) return Boolean(after);
  return (
    after.high.some((value, index) => value !== norm.high[index]) ||
    after.low.some((value, index) => value !== norm.low[index])
  );
}

/**
 * Return the extremes of a curve among the columns that a range shows, and the smallest above 0, which a
 * logarithmic axis begins with; none without one.
 */
function extremesIn(columns, x) {
  let [low, high, positive] = [Infinity, -Infinity, Infinity];
  for (let index = 0; index < columns.at.length; index += 1) {
    if (columns.last[index] < x.low || columns.first[index] > x.high) continue;
    low = Math.min(low, columns.low[index]);
    high = Math.max(high, columns.high[index]);
    const least = columns.low[index] > 0 ? columns.low[index] : columns.high[index];
    if (least > 0) positive = Math.min(positive, least);
  }
  return [low, high, positive].filter(Number.isFinite);
}

function drawCross(context, x, y) {
  context.lineWidth = 1.8;
  context.setLineDash([]);
  context.beginPath();
  context.moveTo(x - 3.5, y - 3.5);
  context.lineTo(x + 3.5, y + 3.5);
  context.moveTo(x + 3.5, y - 3.5);
  context.lineTo(x - 3.5, y + 3.5);
  context.stroke();
}

function drawTriangle(context, x, y) {
  context.beginPath();
  context.moveTo(x - 4, y - 3);
  context.lineTo(x + 4, y - 3);
  context.lineTo(x, y + 4);
  context.fill();
}

/** Return a short line in the style of a curve, for a legend. */
function lineSample({ width, dash = [], alpha = 1 }, colour) {
  const canvas = element("canvas", { width: 52, height: 20, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  context.scale(2, 2);
  Object.assign(context, { strokeStyle: colour, lineWidth: width, globalAlpha: alpha });
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(0, 5);
  context.lineTo(26, 5);
  context.stroke();
  return canvas;
}
