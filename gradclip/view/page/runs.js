// The runs that the page shows: their answers as they come, and the state that all panels share.

import { firstNotBelow, unpacked } from "./arrays.js";
import { FORMAT } from "./source.js";
import { runColour, runMarker } from "./styles.js";

const OTHER_FORMAT =
  "These runs were written for another version of gradclip's page. Install the same version of " +
  "gradclip where they are read and where they are shown.";

const SHOWN_AT_FIRST = 10; // of more runs the others wait until they are chosen

/** A run, with its overview and the curves of the range that is shown. */
export class Run {
  constructor(listed, index) {
    this.id = listed.id;
    this.name = listed.name;
    this.shortName = listed.name;
    this.marker = runMarker(index);
    this.isShown = index < SHOWN_AT_FIRST;
    this.listed = listed;
    this.overview = null;
    this.above = null;
    this.series = null;
    this.lossTag = null;
    this.losses = null;
  }

  /** Whether the run has grown since its overview was made, or has none. */
  get isOld() {
    const { overview, listed } = this;
    return overview === null || overview.steps !== listed.steps || overview.last !== listed.last;
  }

  /** Return where the curve of losses is: that of the clipper, or the scalar that was chosen. */
  get lossCurve() {
    if (this.lossTag !== null) return this.losses && [this.losses, "value"];
    return this.series && [this.series, "loss"];
  }

  /** Return the numbers of the bucket nearest to a step, null without one. */
  numbersAt(step) {
    const series = this.series;
    const index = series === null ? -1 : nearest(series, step);
    if (index < 0) return null;
    const [first, last] = stepsOf(series, index);
    const numbers = { first, last, size: series.size };
    for (const [name, { low, high }] of Object.entries(series.columns))
      numbers[name] = [low[index], high[index]];
    for (const [name, count] of Object.entries(series.counts)) numbers[name] = count[index];
    if (this.lossTag !== null && this.losses) {
      const place = nearest(this.losses, step);
      const column = this.losses.columns.value;
      numbers.loss = place < 0 || !column ? undefined : [column.low[place], column.high[place]];
    }
    return numbers;
  }
}

/** Return the scalar that is most likely the loss of the training, null if none is called so. */
function likelyLoss(tags) {
  const losses = tags.filter((tag) => /(^|[^a-z])loss/i.test(tag));
  return losses.find((tag) => !/val|eval|test/i.test(tag)) ?? losses[0] ?? null;
}

/** Return names without the folders that all of them are in; of one name its last two parts. */
function shortNames(names) {
  const parts = names.map((name) => name.split(/(?<=[/\\])/));
  const shortest = Math.min(...parts.map((each) => each.length));
  let common = names.length > 1 ? 0 : Math.max(shortest - 2, 0);
  while (
    names.length > 1 &&
    common < shortest - 1 &&
    parts.every((each) => each[common] === parts[0][common])
  )
    common += 1;
  return parts.map((each) => each.slice(common).join(""));
}

/** Return the first and the last step of a bucket. */
export function stepsOf(series, index) {
  const first = series.steps[index];
  if (series.size === 1) return [first, first];
  if (index + 1 === series.steps.length) return [first, Math.max(series.end, first)];
  const next = series.steps[index + 1];
  return [first, Math.max(series.gaps[next] ?? next - 1, first)];
}

/** Return the step at which a bucket is drawn. */
export function middleOf(series, index) {
  const [first, last] = stepsOf(series, index);
  return (first + last) / 2;
}

function nearest(series, step) {
  const count = series.steps.length;
  if (!count) return -1;
  const next = firstNotBelow(series.steps, step);
  if (series.size > 1)
    return next < count && series.steps[next] === step ? next : Math.max(next - 1, 0);
  if (next === 0) return 0;
  if (next === count) return count - 1;
  return step - series.steps[next - 1] <= series.steps[next] - step ? next - 1 : next;
}

/**
 * All runs of a source, and what the panels have in common: the range of steps, the step under the
 * crosshair, the threshold that is tried, the axis of the norms.
 *
 * @param source See source.js.
 * @param changed Called after each change; panels then draw themselves anew, or only what lies over their
 *   curves if it is called with "overlay".
 */
export class Runs {
  constructor(source, changed) {
    this.source = source;
    this.all = [];
    this.notes = [];
    this.isReading = false;
    this.range = { first: 0, last: 1 };
    this.step = null;
    this.threshold = null;
    this.focus = null;
    this.isLogarithmic = true;
    this.buckets = 2048;
    this._changed = changed;
    this._followsEnd = true;
    this._pending = new Set();
    this._asked = 0;
  }

  get shown() {
    return this.all.filter((run) => run.isShown && run.overview !== null);
  }

  /** The range of all steps of the runs that are shown, with half a step on both sides. */
  get whole() {
    const overviews = this.shown.map((run) => run.overview);
    if (!overviews.length) return { first: -0.5, last: 0.5 };
    return {
      first: Math.min(...overviews.map((each) => each.first)) - 0.5,
      last: Math.max(...overviews.map((each) => each.last)) + 0.5,
    };
  }

  /** Ask for the list of runs, and for what is new of them. */
  async load() {
    const { format, runs, notes, reading = false } = await this.source.runs();
    if (format !== FORMAT) throw new Error(OTHER_FORMAT);
    this.isReading = reading;
    const gone = this.all.filter((run) => !runs.some((listed) => listed.id === run.id));
    this.notes = [
      ...notes,
      ...gone.map((run) => `${run.name} is gone: its last numbers are shown.`),
    ];
    const asked = runs.map((listed) => {
      let run = this.all.find((known) => known.id === listed.id);
      if (run === undefined) this.all.push((run = new Run(listed, this.all.length)));
      run.listed = listed;
      return run.isShown && run.isOld ? this._loadOverview(run) : null;
    });
    const short = shortNames(this.all.map((run) => run.name));
    this.all.forEach((run, index) => {
      run.shortName = short[index];
    });
    this.setColours(this._isDark);
    const isNew = (await Promise.all(asked)).some((each) => each !== null);
    if (isNew && this._followsEnd) this.range = this.whole;
    if (isNew) await this._loadSeries();
    this._changed();
  }

  async _loadOverview(run) {
    try {
      const overview = await this.source.overview(run.id);
      run.above = overview.distribution && (await unpacked(overview.distribution.above));
      if (run.overview === null && overview.summary.losses === null)
        run.lossTag = likelyLoss(overview.scalars);
      run.overview = overview;
    } catch (error) {
      this.notes.push(`${run.name}: ${error.message}`);
    }
    return run;
  }

  /** Show a range of steps, within those that the runs have. */
  show(first, last) {
    const whole = this.whole;
    const least = Math.min(4, whole.last - whole.first);
    const width = Math.min(Math.max(last - first, least), whole.last - whole.first);
    const middle = (first + last) / 2;
    const begin = Math.min(Math.max(middle - width / 2, whole.first), whole.last - width);
    this.range = { first: begin, last: begin + width };
    this._followsEnd = width >= (whole.last - whole.first) * 0.999999;
    this._changed();
    this.wait(this._loadSeries().then(() => this._changed()));
  }

  zoom(factor, at = (this.range.first + this.range.last) / 2) {
    this.show(at - (at - this.range.first) * factor, at + (this.range.last - at) * factor);
  }

  pan(share) {
    const distance = (this.range.last - this.range.first) * share;
    this.show(this.range.first + distance, this.range.last + distance);
  }

  showWhole() {
    this.show(this.whole.first, this.whole.last);
  }

  /** Show some runs, or hide them. */
  setShown(some, isShown) {
    for (const run of some) run.isShown = isShown;
    this._changed();
    const asked = some.filter((run) => isShown && run.isOld).map((run) => this._loadOverview(run));
    const loaded = Promise.all(asked).then(() => {
      if (this._followsEnd) this.range = this.whole;
      return this._loadSeries();
    });
    this.wait(loaded.then(() => this._changed()));
  }

  setLossTag(run, tag) {
    run.lossTag = tag;
    run.losses = null;
    this.wait(this._loadSeries().then(() => this._changed()));
  }

  /** Give each run the colour that it has on a light or a dark ground. */
  setColours(isDark) {
    this._isDark = isDark;
    this.all.forEach((run, index) => {
      run.colour = runColour(index, isDark);
    });
  }

  setStep(step) {
    if (step === this.step) return;
    this.step = step;
    this._changed("overlay");
  }

  /** Let one run stand out from the others, or none. */
  setFocus(run) {
    if (run === this.focus) return;
    this.focus = run;
    this._changed();
  }

  setThreshold(threshold) {
    this.threshold = threshold;
    this._changed("overlay");
  }

  setLogarithmic(isLogarithmic) {
    this.isLogarithmic = isLogarithmic;
    this._changed();
  }

  /** Whether an answer is awaited. */
  get isPending() {
    return this._pending.size > 0;
  }

  /** Return a promise that is kept once no answer is awaited. */
  async settled() {
    while (this.isPending) await Promise.all(this._pending);
  }

  /** Count a promise among those that `settled` waits for. */
  wait(promise) {
    this._pending.add(promise);
    promise.finally(() => this._pending.delete(promise));
  }

  async _loadSeries() {
    const asked = (this._asked += 1);
    const range = { ...this.range, buckets: this.buckets };
    const answers = await Promise.all(this.shown.map((run) => this._answersOf(run, range)));
    if (asked !== this._asked) return; // a later range was asked for meanwhile
    for (const [run, series, losses] of answers) {
      run.series = series ?? run.series;
      run.losses = losses;
    }
  }

  async _answersOf(run, range) {
    try {
      const [series, losses] = await Promise.all([
        this.source.series(run.id, range),
        run.lossTag === null ? null : this.source.scalar(run.id, run.lossTag, range),
      ]);
      return [run, series, losses];
    } catch (error) {
      this.notes = [
        ...this.notes.filter((note) => !note.startsWith(`${run.name}: `)),
        `${run.name}: ${error.message}`,
      ];
      return [run, null, null];
    }
  }
}
