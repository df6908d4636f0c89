"""Effect of a few bad gradients on a training, clipped in several ways and not at all.

    python -m benchmarks.experiments.spikes.run [--seeds 5] [--steps 400]
        [--models rnn gpt] [--processes 2] [--save benchmarks/results/spikes.md]

Two small models learn the characters of real text, the topics of Python's ``help()``. At preset
steps the gradients are corrupted after the backward pass and before clipping: they are multiplied,
or one element becomes NaN. The effect is measured by the final loss on held-out text.

For each seed, all ways to clip start from the same weights and read the same batches. Each trains
once up to the first corrupted step. From a copy of that state it continues once for each corruption
and once without, so that a run and its clean run are the same up to the corruption.

No setting is chosen by the results. The learning rate is the one of three with the lowest loss in a
clean run without clipping, with a seed that is not used again. The fixed threshold is the
number that `gradclip report` names for that run. The rules keep their defaults.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import gradclip
from benchmarks.common.gradients import machine
from benchmarks.common.markdown import save
from benchmarks.common.text import HELD_OUT
from benchmarks.experiments.spikes.outcomes import Outcome, Pilot, rows_of
from benchmarks.experiments.spikes.picture import draw
from benchmarks.experiments.spikes.report import report
from benchmarks.experiments.spikes.training import (
    ARMS,
    BATCH,
    CORRUPTIONS,
    LEARNERS,
    LENGTH,
    WARM_UP,
    Training,
    code_of,
    text,
)
from gradclip.cli.demo.training import one_thread
from gradclip.report.advice import advised
from gradclip.report.run import run_of
from gradclip.report.summary import summarized

PILOT = 0
"""Seed of the runs that decide the learning rate and the fixed threshold."""
BEGIN = 2 / 3
"""Share of the steps before the first corrupted one."""
LONGEST = max(corruption.steps for corruption in CORRUPTIONS.values())


@one_thread()
def try_rate(name: str, rate: float, steps: int) -> Pilot:
    """Train cleanly without clipping; return the loss and the number that the report names."""
    sink = gradclip.MemorySink()
    training = Training(LEARNERS[name], rate, steps, PILOT, {"max_norm": None, "log": sink})
    training.advance(0, steps)
    training.close()
    run = run_of(sink.steps, name)
    advice = advised(run, summarized(run))
    median = float(np.median(run.norms[run.finite]))
    return Pilot(name, rate, training.loss(), advice.kind, advice.threshold, median)


@one_thread()
def train(pilot: Pilot, arm: str, seed: int, steps: int) -> list[Outcome]:
    """Train with one way to clip up to the first corrupted step, then with each corruption."""
    options = ARMS[arm](pilot.fixed)
    training = Training(LEARNERS[pilot.model], pilot.rate, steps, seed, options)
    begin = first_corrupted(steps)
    training.advance(0, begin)
    state = training.state()
    outcomes = []
    for name, corruption in CORRUPTIONS.items():
        training.load(state)
        training.advance(begin, steps, corruption)
        outcomes.append(Outcome(pilot.model, name, arm, seed, training.loss(), *training.counted()))
    training.close()
    return outcomes


def first_corrupted(steps: int) -> int:
    """Return the index of the first step whose gradient is corrupted."""
    return int(steps * BEGIN)


def chosen(pilots: Iterable[Pilot]) -> dict[str, Pilot]:
    """Return the pilot run with the lowest loss of each model."""
    best: dict[str, Pilot] = {}
    for pilot in sorted(pilots, key=lambda pilot: (math.isnan(pilot.loss), pilot.loss)):
        best.setdefault(pilot.model, pilot)
    return best


def measure(
    models: Sequence[str], seeds: int, steps: int, processes: int
) -> tuple[list[Pilot], list[Outcome]]:
    """Return the pilot runs and the results of all trainings."""
    rates = [(name, rate, steps) for name in models for rate in LEARNERS[name].rates]
    pilots = [*results(try_rate, rates, processes)]
    best = chosen(pilots)
    jobs = [
        (best[name], arm, seed, steps)
        for name in models
        for arm in ARMS
        for seed in range(PILOT + 1, PILOT + 1 + seeds)
    ]
    return pilots, [each for several in results(train, jobs, processes) for each in several]


def results(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], processes: int
) -> Iterator[Any]:
    """Yield the result of a function for each job, in their order, and show the progress."""
    call: Callable[[tuple[Any, ...]], Any] = partial(_call, function)
    with ExitStack() as stack:
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            yielded: Iterator[Any] = pool.imap(call, jobs)
        else:
            yielded = map(call, jobs)
        for count, result in enumerate(yielded, start=1):
            print(f"{function.__name__}: {count} of {len(jobs)}", file=sys.stderr, flush=True)
            yield result


def _call(function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    return function(*job)


def settings(options: argparse.Namespace, minutes: float) -> dict[str, str]:
    """Return the settings of the trainings, for the report."""
    training, held_out, characters = text()
    environment = {**machine(), "threads": f"1 in each of {options.processes} processes"}
    command = (
        f"python -m benchmarks.experiments.spikes.run --seeds {options.seeds} "
        f"--steps {options.steps} --models {' '.join(options.models)} "
        f"--processes {options.processes}"
    )
    begin = first_corrupted(options.steps)
    return {
        "command": f"`{command} --save {options.save}`" if options.save else f"`{command}`",
        "made with": f"gradclip {gradclip.__version__}, "
        + ", ".join(f"{key} {value}" for key, value in environment.items())
        + f"; {date.today()}, {minutes:.0f} minutes",
        "text": f"`pydoc_data.topics`, {len(training):,} characters of {characters} kinds to "
        f"train on; the final loss is that of {held_out[:, 1:].numel():,} characters of the last "
        f"{HELD_OUT:.0%}, in nats",
        "seeds": f"{options.seeds}, from {PILOT + 1} to {PILOT + options.seeds}",
        "steps": f"{options.steps}, each on {BATCH} pieces of "
        f"{LENGTH} characters; the learning rate rises in the first "
        f"{WARM_UP:.0%} of them and falls to 0 in a straight line",
        "corrupted": f"step {begin} of 0 to {options.steps - 1}, or {begin} to "
        f"{begin + LONGEST - 1}; the NaN is the first element of the first parameter",
        **{name: str(LEARNERS[name]) for name in options.models},
    }


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--models", nargs="+", choices=[*LEARNERS], default=[*LEARNERS])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--save", type=Path, help="write the Markdown to this file and a picture beside it"
    )
    options = parser.parse_args(arguments)
    if options.steps - first_corrupted(options.steps) < LONGEST:
        parser.error(f"--steps: a third of them must be at least {LONGEST}")
    if options.seeds < 2:
        parser.error("--seeds: an interval needs at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    options = parsed(arguments)
    start = time.monotonic()
    pilots, outcomes = measure(options.models, options.seeds, options.steps, options.processes)
    chosen_settings = settings(options, (time.monotonic() - start) / 60)
    rows = rows_of(outcomes)
    code = {arm: code_of(arm) for arm in ARMS}
    lines = report(chosen_settings, code, pilots, chosen(pilots), rows)
    if options.save:
        picture = options.save.with_suffix(".png")
        lines += ["", f"![Final losses by corruption and way to clip]({picture.name})"]
        save(lines, options.save)
        draw(rows, picture, guess=math.log(text()[2]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
