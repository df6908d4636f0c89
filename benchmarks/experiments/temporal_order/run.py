"""The temporal order problem with and without clipping, with many seeds side by side.

    python -m benchmarks.experiments.temporal_order.run [--lengths 20 30 50] [--seeds 20]
        [--updates 100000] [--minutes 16] [--checkpoint DIR]
        [--save benchmarks/results/temporal_order.md]

Section 4 of Pascanu, Mikolov and Bengio (2013), see `task.py`: 50 tanh units, SGD at 0.01, batches
of 20, clipping at 1. All seeds of an arm are trained at once: the weights of a seed are one index
of dimension 0 of all parameters, the loss is the sum over seeds, and one clipper scales each index
by its own norm. Both arms start with the same weights and see the same sequences.

Each length ends after a number of updates, or after a wall time for both arms together, whichever
comes first. With a folder for checkpoints the same command continues an interrupted run to the same
bits; its minutes are counted together. The authors' program stops a seed at its success, or after
5,000,000 updates. Here all seeds continue, to show whether success lasts.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

import torch

import gradclip
from benchmarks.common.gradients import machine
from benchmarks.common.markdown import save
from benchmarks.experiments.temporal_order.report import (
    ABOUT_COMPARISONS,
    ABOUT_RATES,
    DEFINITION,
    Result,
    comparisons,
    draw,
    rates,
    verdicts,
)
from benchmarks.experiments.temporal_order.task import SPREAD, UNITS
from benchmarks.experiments.temporal_order.training import (
    BATCH,
    LEARNING_RATE,
    MAX_NORM,
    Plan,
    trained,
)

COMMAND = "Written by `python -m benchmarks.experiments.temporal_order.run`."


def report(results: list[Result], updates: int, minutes: float) -> list[str]:
    """Return the report as Markdown."""
    environment = {"gradclip": gradclip.__version__, **machine(), "date": datetime.date.today()}
    plan = results[0].plan
    budget = (
        f"Budget for each length: {updates:,} updates of each arm, or {minutes:g} minutes of wall "
        f"time for both arms together, checked every {plan.check_every:,} updates. {plan.seeds} "
        f"seeds in each arm; {UNITS} tanh units, weights normal with standard deviation {SPREAD}, "
        f"biases 0 (the paper's basic tanh), SGD at {LEARNING_RATE}, batch {BATCH}, threshold "
        f"{MAX_NORM:g} for each seed's norm."
    )
    title = "# Temporal order, clipped and unclipped"
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    return [
        *_paragraphs(title, COMMAND, versions, budget, DEFINITION),
        *verdicts(results, updates, minutes),
        "",
        *rates(results),
        "",
        *_paragraphs(ABOUT_RATES),
        *comparisons(results),
        "",
        ABOUT_COMPARISONS,
    ]


def _paragraphs(*texts: str) -> list[str]:
    return [line for text in texts for line in (text, "")]


def main(argv: list[str] | None = None) -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 30, 50])
    parser.add_argument("--seeds", type=int, default=20, help="seeds of each arm")
    parser.add_argument("--updates", type=int, default=100_000, help="budget of each length")
    parser.add_argument("--minutes", type=float, default=16, help="budget of each length")
    parser.add_argument("--check-every", type=int, default=250, help="updates between checks")
    parser.add_argument("--checkpoint", type=Path, help="folder of checkpoints, to continue from")
    parser.add_argument(
        "--save", type=Path, help="write the Markdown to this file and a picture beside it"
    )
    options = parser.parse_args(argv)
    if not all(10 <= length < 1000 for length in options.lengths):
        parser.error("--lengths: give lengths from 10 to 999")
    if not 2 <= options.seeds < 10_000:
        parser.error("--seeds: give 2 to 9,999")
    if options.updates < 1 or options.check_every < 1 or not options.minutes > 0:
        parser.error("--updates, --check-every and --minutes: give numbers above 0")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are small
    try:
        results = [_result(options, length) for length in options.lengths]
        lines = report(results, options.updates, options.minutes)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(lines))
    if options.save is not None:
        picture = options.save.with_suffix(".png")
        lines += ["", f"![Seeds that have solved the task, and errors]({picture.name})"]
        save(lines, options.save)
        draw(results, picture)


def _result(options: argparse.Namespace, length: int) -> Result:
    folder: Path | None = options.checkpoint
    plan = Plan(length, options.seeds, options.check_every)
    checkpoint = None if folder is None else folder / f"length-{length}.pt"
    return Result.of(trained(plan, options.updates, options.minutes, checkpoint))


if __name__ == "__main__":
    main()
