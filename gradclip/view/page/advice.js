// The advice of the report for each run, with its reason and its line of code.

import { copyButton, element, refill } from "./elements.js";
import { number } from "./scales.js";
import { swatch } from "./styles.js";

const FEW = 3; // runs whose advice is told in full
const KINDS = {
  quiet: "quiet",
  spiky: "spiky",
  drifting: "drifting",
  exploding: "exploding",
  short: "too few steps",
  unknown: "no finite norm above 0",
};

/** The advice of the report for each run: its kind, the reason, how sure it is, a line of code. */
export class Advice {
  constructor(page) {
    this.page = page;
    this.list = element("div.cards");
    this.element = element(
      "section.panel",
      {},
      element("div.head", {}, element("h2", {}, "Advice")),
      this.list,
    );
  }

  draw() {
    const { shown } = this.page.runs;
    this.element.hidden = !shown.length;
    if (
      this._drawn ===
      JSON.stringify(shown.map((run) => [run.name, run.colour, run.overview.advice]))
    )
      return;
    this._drawn = JSON.stringify(shown.map((run) => [run.name, run.colour, run.overview.advice]));
    refill(
      this.list,
      shown.map((run) => this._card(run, run.overview.advice, shown.length <= FEW)),
    );
  }

  _card(run, advice, isFull) {
    const words = [
      element("p", {}, advice.reason),
      element("p", {}, `Confidence: ${advice.confidence.level}. ${advice.confidence.reason}`),
      ...advice.warnings.map((warning) => element("p.note", {}, warning)),
    ];
    return element(
      "article.card",
      {},
      element(
        "h3",
        {},
        swatch(run),
        element("span.name", { title: run.name }, run.shortName),
        element(`span.kind.${advice.kind}`, {}, KINDS[advice.kind] ?? advice.kind),
      ),
      isFull ? words.slice(0, 2) : null,
      element("div.code", {}, element("code", {}, advice.line), copyButton(advice.line)),
      advice.threshold === null
        ? null
        : element(
            "button.quiet",
            { type: "button", click: () => this.page.runs.setThreshold(advice.threshold) },
            `Try ${number(advice.threshold)}`,
          ),
      isFull ? words.slice(2) : element("details", {}, element("summary", {}, "Why"), words),
    );
  }
}
