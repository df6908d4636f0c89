// The incidents of the runs in plain words; a click shows the steps around one in all panels.

import { element, refill } from "./elements.js";
import { number, whole } from "./scales.js";
import { swatch } from "./styles.js";

const FEW = 8;
const AROUND = 40; // logged steps that are shown on each side, at least

export class Incidents {
  constructor(page) {
    this.page = page;
    this.list = element("ol.incidents");
    this.more = element("button.quiet", { type: "button", click: () => this._toggle() });
    this.element = element(
      "section.panel",
      {},
      element(
        "div.head",
        {},
        element("h2", {}, "Incidents"),
        element("p.hint", {}, "Choose one to see its steps in all panels."),
      ),
      this.list,
      this.more,
    );
    this._isLong = false;
    this._chosen = null;
  }

  draw() {
    const entries = this.page.runs.shown.flatMap((run) =>
      run.overview.incidents.map((incident) => ({ run, incident })),
    );
    entries.sort((a, b) => a.incident.first_step - b.incident.first_step);
    const key = JSON.stringify([
      entries.map(({ run, incident }) => [run.id, run.colour, incident.step, incident.text]),
      this._isLong,
      this._chosen,
    ]);
    if (key === this._key) return;
    this._key = key;
    const shown = this._isLong ? entries : entries.slice(0, FEW);
    const rest = this.page.runs.shown.reduce((sum, run) => sum + run.overview.more_incidents, 0);
    refill(
      this.list,
      shown.map((entry) => this._item(entry)),
      entries.length
        ? null
        : element(
            "li.none",
            {},
            "None: every norm was finite, and none was far above those before it.",
          ),
      rest && this._isLong
        ? element("li.none", {}, `${whole(rest)} more, lower ones, are not listed.`)
        : null,
    );
    this.more.hidden = entries.length <= FEW;
    this.more.textContent = this._isLong ? "Show fewer" : `Show all ${whole(entries.length)}`;
  }

  _toggle() {
    this._isLong = !this._isLong;
    this.draw();
  }

  _item({ run, incident }) {
    const led = incident.parameters.map(
      ([name, norm]) => `${name} (${norm === null ? "not finite" : number(norm, 3)})`,
    );
    const key = `${run.id} ${incident.step} ${incident.kind}`;
    const isTold = incident.sentence !== null && (this._chosen === key || !led.length);
    const said = isTold ? element("span.led", {}, `At the time: ${incident.sentence}`) : null;
    return element(
      "li",
      {},
      element(
        "button.incident",
        {
          type: "button",
          "aria-pressed": String(this._chosen === key),
          click: () => this._show(run, incident, key),
        },
        swatch(run),
        element(
          "span.text",
          {},
          element("span", {}, incident.text),
          led.length ? element("span.led", {}, `Led by ${led.join(", ")}.`) : null,
          said,
        ),
      ),
    );
  }

  _show(run, incident, key) {
    this._chosen = key;
    const { overview } = run;
    const gap = (overview.last - overview.first) / Math.max(overview.steps - 1, 1);
    const room = Math.max(AROUND * gap, incident.last_step - incident.first_step);
    this.page.runs.show(incident.first_step - room, incident.last_step + room);
    this.page.runs.setStep(incident.step);
    this.page.showLeading(
      run,
      incident.parameters.map(([name]) => name),
    );
    this.draw();
  }
}
