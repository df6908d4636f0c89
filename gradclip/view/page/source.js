// Where the page gets its runs from. A source is an object with these members; those that answer
// return promises. RunView in run_view.py makes the answers, the same for all sources.
//
//   live                      true if runs may grow or vanish: the page then asks again
//   runs()                    { format, runs: [{ id, name, steps, first, last, sampled, observed }], notes: [sentence], reading }
//                             id: names the run in the other questions; steps: number of logged steps;
//                             notes: what the reader should know, such as "No run was found in ..."
//                             reading: true if not all that is there was read yet
//   overview(id)              RunView.overview: the above, and advice, incidents, distribution, summary,
//                             clip_rate_window, scalars (tags), quantities (of parameters)
//   series(id, range)         RunView.series: { size, steps, end, gaps, columns: { norm: { low, high } }, counts }
//                             gaps: { step of the bucket behind a gap: last step before it }
//   scalar(id, tag, range)    the same for another scalar of the run, in the column "value"
//   parameters(id, quantity, range, search, most)
//                             RunView.parameters: { names, matching, steps, end, high, nonfinite }
//
// A range is { first, last, buckets }. Arrays are packed (arrays.js). A promise that fails has a
// sentence for the reader as its error's message.

import { firstNotBelow, unpacked } from "./arrays.js";

/** The version of the answers that this page reads. */
export const FORMAT = 1;

/** Runs whose answers are embedded in the file: of the whole range, in as many buckets as fit. */
export class EmbeddedSource {
  live = false;

  constructor(content) {
    this._content = content;
    this._unpacked = new Map();
  }

  async runs() {
    return {
      format: this._content.format,
      notes: this._content.notes,
      runs: this._content.runs.map((run, index) => ({ ...run.overview, id: String(index) })),
    };
  }

  async overview(id) {
    return this._content.runs[id].overview;
  }

  async series(id, range) {
    return cut(
      await this._once(`series ${id}`, () => unpackedSeries(this._content.runs[id].series)),
      range,
    );
  }

  async scalar(id, tag, range) {
    const answer = this._content.runs[id].scalars[tag];
    return cut(await this._once(`scalar ${id} ${tag}`, () => unpackedSeries(answer)), range);
  }

  async parameters(id, quantity, range, search, most) {
    const answer = this._content.runs[id].parameters[quantity];
    const table = await this._once(`parameters ${id} ${quantity}`, () => unpackedTable(answer));
    return chosen(table, range, search, most);
  }

  _once(key, make) {
    if (!this._unpacked.has(key)) this._unpacked.set(key, make());
    return this._unpacked.get(key);
  }
}

/** Runs that a server answers about, at addresses below a base such as "./". */
export class ServedSource {
  live = true;

  constructor(base) {
    this._base = base;
  }

  async runs() {
    return this._ask("runs", {});
  }

  async overview(id) {
    return this._ask("overview", { run: id });
  }

  async series(id, range) {
    return unpackedSeries(await this._ask("series", { run: id, ...range }));
  }

  async scalar(id, tag, range) {
    return unpackedSeries(await this._ask("scalar", { run: id, tag, ...range }));
  }

  async parameters(id, quantity, range, search, most) {
    const question = { run: id, quantity, ...range, search, most };
    return unpackedTable(await this._ask("parameters", question));
  }

  async _ask(name, question) {
    const address = new URL(
      `${this._base}${name}?${new URLSearchParams(question)}`,
      document.baseURI,
    );
    let response;
    try {
      response = await fetch(address);
    } catch {
      throw new Error("The server does not answer: is TensorBoard still running?");
    }
    const answer = await response.json().catch(() => ({}));
    if (!response.ok)
      throw new Error(answer.error ?? `The server answered ${response.status} to ${name}.`);
    return answer;
  }
}

async function unpackedSeries(answer) {
  const columns = {};
  for (const [name, { low, high }] of Object.entries(answer.columns)) {
    const lowest = await unpacked(low);
    columns[name] = { low: lowest, high: high ? await unpacked(high) : lowest };
  }
  const counts = {};
  for (const [name, count] of Object.entries(answer.counts)) counts[name] = await unpacked(count);
  return {
    size: answer.size,
    steps: await unpacked(answer.steps),
    end: answer.end,
    gaps: answer.gaps,
    columns,
    counts,
  };
}

async function unpackedTable(answer) {
  const [steps, high, nonfinite] = [answer.steps, answer.high, answer.nonfinite].map(unpacked);
  return { ...answer, steps: await steps, high: await high, nonfinite: await nonfinite };
}

/** Return the buckets of a range, and one more on each side of it. */
function cut(series, { first, last }) {
  const begin = Math.max(firstNotBelow(series.steps, first) - 2, 0);
  const end = Math.min(firstNotBelow(series.steps, last) + 2, series.steps.length);
  const next = series.steps[end];
  const part = (numbers) => numbers.subarray(begin, end);
  const columns = Object.entries(series.columns);
  return {
    size: series.size,
    steps: part(series.steps),
    end: end < series.steps.length ? (series.gaps[next] ?? next - 1) : series.end,
    gaps: series.gaps,
    columns: Object.fromEntries(
      columns.map(([name, { low, high }]) => [name, { low: part(low), high: part(high) }]),
    ),
    counts: Object.fromEntries(
      Object.entries(series.counts).map(([name, count]) => [name, part(count)]),
    ),
  };
}

/** Return the rows of a table whose names match, and the columns of a range. */
function chosen(table, { first, last }, search, most) {
  const wanted = search.toLowerCase();
  const matching = [...table.names.keys()].filter((row) =>
    table.names[row].toLowerCase().includes(wanted),
  );
  const rows = matching.slice(0, most);
  const width = table.steps.length;
  const begin = Math.max(firstNotBelow(table.steps, first + 1) - 1, 0);
  const end = Math.max(firstNotBelow(table.steps, last + 1), begin);
  const part = (cells) => {
    const Type = cells.constructor;
    const kept = new Type(rows.length * (end - begin));
    rows.forEach((row, index) =>
      kept.set(cells.subarray(row * width + begin, row * width + end), index * (end - begin)),
    );
    return kept;
  };
  return {
    names: rows.map((row) => table.names[row]),
    matching: matching.length,
    steps: table.steps.subarray(begin, end),
    end: end < width ? table.steps[end] - 1 : table.end,
    high: part(table.high),
    nonfinite: part(table.nonfinite),
  };
}
