"""Cost of the interactive page: writing it, its size, the first picture, and a zoom.

    python -m benchmarks.cost.page [--steps 1000000] [--runs 10] [--each 100000]

One run with losses is read from lines of JSON and from event files and written as a page. Then a
page of several runs is opened in Chromium: the time from opening the file to the first picture of
all panels, and from a zoom to the picture of it, the median of several.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gradclip import JsonlSink, LoggedStep, Sink, TensorBoardSink
from gradclip.report import read_runs
from gradclip.report.printing import print_table
from gradclip.view.html import write_page
from tests.support.browser import chromium, missing
from tests.support.page import Page

BATCH = 1000
ZOOMS = 7
_FIRST_PICTURE = "await gradclipPage.settled(); return performance.now()"
_ZOOM = """
await gradclipPage.settled();
const start = performance.now();
gradclipPage.show(arguments[0], arguments[1]);
await gradclipPage.settled();
return performance.now() - start;
"""


def logged(sink: Sink, steps: int, seed: int) -> None:
    """Log steps with noisy norms, a threshold and losses."""
    random = np.random.default_rng(seed)
    norms = random.lognormal(sigma=0.3, size=steps)
    losses = 2 + 0.1 * random.standard_normal(steps)
    sink.begin({})
    for begin in range(0, steps, BATCH):
        sink.write([*_batch(norms, losses, begin, min(begin + BATCH, steps))])
    sink.close()


def _batch(norms: np.ndarray, losses: np.ndarray, begin: int, end: int) -> Iterator[LoggedStep]:
    for step in range(begin, end):
        norm, loss = float(norms[step]), float(losses[step])
        clipped = min(norm, 1.0)
        counts = (clipped / norm, False, False, 0.5, 0, 0)
        yield LoggedStep(step, 1e9 + step, norm, clipped, 1.0, *counts, loss=loss)


def written(logs: list[Path], page: Path) -> list[str]:
    """Write a page; return the seconds for reading and writing, and its size."""
    begin = time.perf_counter()
    runs = read_runs(logs)
    read = time.perf_counter()
    write_page(runs, page)
    end = time.perf_counter()
    size = page.stat().st_size / 1e6
    return [f"{read - begin:.1f} s", f"{end - read:.1f} s", f"{size:.2f} MB"]


def shown(page: Path, steps: int) -> list[str]:
    """Open a page; return the milliseconds to its first picture and of a zoom."""
    with chromium() as browser:
        browser.get(page.as_uri())
        opened = Page(browser)
        first = opened.awaited(_FIRST_PICTURE)
        middles = np.linspace(0.2, 0.8, ZOOMS) * steps
        zooms = [
            opened.awaited(_ZOOM, middle - steps / 2 ** (n + 2), middle + steps / 2 ** (n + 2))
            for n, middle in enumerate(middles.tolist())
        ]
    return [f"{first:.0f} ms", f"{statistics.median(zooms):.0f} ms", f"{max(zooms):.0f} ms"]


def main(argv: list[str] | None = None) -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of the long run")
    parser.add_argument("--runs", type=int, default=10, help="runs of the page that is opened")
    parser.add_argument("--each", type=int, default=100_000, help="steps of each of them")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines, events = folder / "long.jsonl", folder / "long"
        logged(JsonlSink(lines), options.steps, 0)
        logged(TensorBoardSink(events), options.steps, 0)
        rows = [
            (f"{options.steps:,} steps from {kind}", *written([log], folder / "long.html"))
            for kind, log in (("lines of JSON", lines), ("event files", events))
        ]
        logs = [folder / f"{index}.jsonl" for index in range(options.runs)]
        for index, log in enumerate(logs):
            logged(JsonlSink(log), options.each, index)
        several = f"{options.runs} runs of {options.each:,} steps"
        rows.append((several, *written(logs, folder / "several.html")))
        print_table(("page", "reading", "writing", "size"), rows, sys.stdout)
        if missing() is None:
            row = (several, *shown(folder / "several.html", options.each))
            print_table(("in Chromium", "first picture", "zoom", "longest zoom"), [row], sys.stdout)


if __name__ == "__main__":
    main()
