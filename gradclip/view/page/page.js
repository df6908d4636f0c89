// The page: its panels, what stands above them, and when they are drawn.

import { Advice } from "./advice.js";
import { HELP } from "./chart.js";
import { ClipRateChart, LossChart, NormChart } from "./curves.js";
import { Distribution } from "./distribution.js";
import { element, refill, toggle } from "./elements.js";
import { HeatMap } from "./heat_map.js";
import { Incidents } from "./incidents.js";
import { NumberTable } from "./number_table.js";
import { RunTable } from "./run_table.js";
import { Runs } from "./runs.js";
import { between, whole } from "./scales.js";
import { EmbeddedSource } from "./source.js";
import { Palette } from "./styles.js";

const PATIENCE = 5000; // milliseconds between two looks at runs that may grow
const SOON = 2000; // the same while the source has not read all that is there

class Page {
  constructor(root, source) {
    this.root = root;
    this.runs = new Runs(source, (what) => this._changed(what));
    this.norms = new NormChart(this);
    this.losses = new LossChart(this);
    this.rates = new ClipRateChart(this);
    this.map = new HeatMap(this);
    this.distribution = new Distribution(this);
    this.advice = new Advice(this);
    this.incidents = new Incidents(this);
    this.runTable = new RunTable(this);
    this.numberTable = new NumberTable(this);
    this.charts = [this.norms, this.losses, this.rates, this.map];
    this.panels = [
      this.runTable,
      ...this.charts,
      this.distribution,
      this.advice,
      this.incidents,
      this.numberTable,
    ];
    this.message = element("p.message", { role: "status" }, "Reading the runs …");
    this.notes = element("ul.notes");
    this.spoken = element("p.spoken", { "aria-live": "polite" });
    this.content = element(
      "main",
      { hidden: true },
      this.runTable.element,
      ...this.charts.map((chart) => chart.element),
      element("div.columns", {}, this.distribution.element, this.advice.element),
      this.incidents.element,
      this.numberTable.element,
    );
    refill(root, this._header(), this.message, this.notes, this.content, this.spoken);
    this._watch();
  }

  _header() {
    const { runs } = this;
    const button = (label, name, click) =>
      element("button", { type: "button", "aria-label": name, title: name, click }, label);
    this.help = element("p.help", { hidden: true }, HELP);
    this.isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    this.themeButton = toggle("Dark", this.isDark, (isDark) => this.setTheme(isDark));
    return element(
      "header",
      {},
      element("h1", {}, "Gradients"),
      element(
        "div.toolbar",
        { role: "toolbar", "aria-label": "Steps and axes" },
        element(
          "span.group",
          {},
          button("◀", "Earlier steps", () => runs.pan(-0.5)),
          button("−", "Zoom out", () => runs.zoom(2)),
          button("+", "Zoom in", () => runs.zoom(0.5, runs.step ?? undefined)),
          button("▶", "Later steps", () => runs.pan(0.5)),
          button("All steps", "Show all steps", () => runs.showWhole()),
        ),
        toggle("Log axis", true, (isLogarithmic) => runs.setLogarithmic(isLogarithmic)),
        this.themeButton,
        toggle("Help", false, (isOpen) => {
          this.help.hidden = !isOpen;
        }),
      ),
      this.help,
    );
  }

  /** Read the runs and draw them; of a source that lives, again and again. */
  async start() {
    await this._load();
    if (this.runs.source.live) this._lookAgain();
  }

  _lookAgain() {
    const again = async () => {
      if (this._isSeen()) await this._load();
      this._lookAgain();
    };
    setTimeout(again, this.runs.isReading ? SOON : PATIENCE);
  }

  /** Tell whether anybody may look: another tab of TensorBoard hides the frame alone. */
  _isSeen() {
    return !document.hidden && this.root.getClientRects().length > 0;
  }

  async _load() {
    try {
      await this.runs.load();
    } catch (error) {
      this._say(error.message);
      return;
    }
    this.content.hidden = !this.runs.all.some((run) => run.overview);
    if (this.content.hidden) this._say("There is no run to show.");
    else this._say("");
    this._changed();
  }

  _say(text) {
    this.message.textContent = text;
    this.message.hidden = !text;
  }

  /** Draw all panels, or only what lies over them, before the next frame. */
  _changed(what = "all") {
    this._isWhole = this._isWhole || what === "all";
    if (this._frame) return;
    this._frame = new Promise((resolve) => {
      requestAnimationFrame(() => {
        this._frame = null;
        this._draw(this._isWhole);
        this._isWhole = false;
        resolve();
      });
    });
  }

  _draw(isWhole) {
    if (this.content.hidden) return this._showNotes();
    if (isWhole) {
      this.runs.buckets = 2 ** Math.ceil(Math.log2(2 * Math.max(this.content.clientWidth, 500)));
      this.map.refresh();
      this.panels.forEach((panel) => panel.draw());
      this._showNotes();
    } else {
      this.charts.forEach((chart) => chart.drawOverlay());
      this.runTable.fill();
      if (this.runs.threshold !== this._threshold) this.distribution.draw();
    }
    this._threshold = this.runs.threshold;
  }

  _showNotes() {
    const { shown, notes, source } = this.runs;
    const sizes = [
      ...new Set(shown.map((run) => run.series?.size ?? 1).filter((size) => size > 1)),
    ];
    const sampled = shown
      .filter((run) => run.overview.sampled)
      .map((run) => `${run.name}: a sample of the logged steps is shown.`);
    const observed = shown
      .filter((run) => run.overview.observed)
      .map(
        (run) =>
          `${run.name}: clipping was only observed. "After" is what it would have given; no gradient was changed.`,
      );
    const kept = source.live
      ? "zoom in to see every step."
      : "this file keeps no more of a run this long.";
    const extremes = sizes.map(
      (size) =>
        `Curves show the smallest and the largest value of every ${whole(size)} logged steps; ${kept}`,
    );
    const all = [...notes, ...sampled, ...observed, ...extremes];
    const key = all.join("\n");
    if (key !== this._notes)
      refill(
        this.notes,
        all.map((note) => element("li", {}, note)),
      );
    this._notes = key;
  }

  /** Say the numbers under the crosshair to a screen reader. */
  announce() {
    const { step, shown } = this.runs;
    const numbers = shown
      .map((run) => [run, run.numbersAt(step)])
      .filter(([, each]) => each !== null);
    const texts = numbers.map(([run, each]) =>
      [
        shown.length > 1 ? run.shortName : "",
        `before ${between(each.norm)}, after ${between(each.clipped_norm)}`,
        each.threshold ? `threshold ${between(each.threshold)}` : "",
        each.loss ? `loss ${between(each.loss)}` : "",
        each.nonfinite ? "not finite" : "",
        each.skipped ? "skipped" : "",
      ]
        .filter(Boolean)
        .join(", "),
    );
    this.spoken.textContent = `Step ${whole(step)}: ${texts.join("; ")}`;
  }

  /** Mark the parameters that led at an incident in the map. */
  showLeading(run, names) {
    this.map.lead(run, names);
  }

  setTheme(isDark) {
    this.isDark = isDark;
    this.themeButton.setAttribute("aria-pressed", String(isDark));
    this.root.dataset.theme = isDark ? "dark" : "light";
    this.palette = new Palette(this.root);
    this.runs.setColours(isDark);
    this._changed();
  }

  _watch() {
    this.setTheme(this.isDark);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ({ matches }) =>
      this.setTheme(matches),
    );
    let width = 0;
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width === width) return;
      width = contentRect.width;
      this._changed();
    }).observe(this.root);
    // Paper is white, and a printer has more points than a screen.
    let wasDark = false;
    const print = (isPrinting) => {
      if (isPrinting) wasDark = this.isDark;
      document.documentElement.toggleAttribute("data-printing", isPrinting);
      this.setTheme(isPrinting ? false : wasDark);
      this._draw(true);
    };
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
  }

  /** Return a promise that is kept once all that was asked for is drawn. */
  async settled() {
    do {
      await this.runs.settled();
      await this._frame;
    } while (this._frame || this.runs.isPending);
  }
}

/**
 * Show the runs of a source.
 *
 * @param root The element to show them in; what it holds is replaced.
 * @param source See source.js.
 * @return What tests read: `settled()`, and `drawn()`, the curves as they are drawn; `show()`, which
 *   shows a range of steps, and `setTheme()` for a light or a dark page.
 */
export function show(root, source) {
  root.classList.add("gradclip");
  const page = new Page(root, source);
  const started = page.start();
  const drawn = () => ({
    range: page.runs.range,
    threshold: page.runs.threshold,
    curves: [page.norms, page.losses, page.rates].flatMap((chart) =>
      chart.drawn.map(({ run, name, columns }) => ({ run: run.name, name, ...columns })),
    ),
    map: page.map.drawn && {
      ...page.map.drawn,
      steps: [...page.map.drawn.steps],
      high: [...page.map.drawn.high],
    },
    distribution: page.distribution.drawn,
  });
  const settled = () => started.then(() => page.settled());
  return Object.freeze({
    settled,
    drawn,
    show: (first, last) => page.runs.show(first, last),
    setTheme: (isDark) => page.setTheme(isDark),
  });
}

/** Show the runs that a file holds. */
export function showEmbedded() {
  const root = document.getElementById("gradclip");
  try {
    const content = JSON.parse(document.getElementById("gradclip-runs").textContent);
    window.gradclipPage = show(root, new EmbeddedSource(content));
  } catch {
    root.textContent =
      "The runs in this file cannot be read: it is damaged. Write it again with gradclip report --html.";
  }
}
