"""Every way to clip on trainings that differ in what matters, without tuning anything for a task.

    python -m benchmarks.experiments.without_tuning.run [--seeds 10] [--processes 2]
        [--sets design "held out" "written last" "second round" "third round"]
        [--outcomes build/without_tuning.jsonl] [--save benchmarks/results/without_tuning.md]

For each seed all ways to clip start from the same weights and see the same data. Fixed thresholds
of a grid over four decades show what a threshold that somebody tuned would reach: the regret of a
way to clip is how much worse than the best of them its mean score is. Outcomes are appended to a
file as they come, and those that it holds already are not computed again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from benchmarks.common.markdown import save
from benchmarks.experiments.without_tuning.arms import ARMS
from benchmarks.experiments.without_tuning.catalogue import SETS, TASKS
from benchmarks.experiments.without_tuning.report import report
from benchmarks.experiments.without_tuning.training import Outcome, train

FIRST_SEED = 101
"""Seeds below were seen while the rule was made."""

Job = tuple[str, str, int]
"""Names of task and arm, and the seed."""


def trained(job: Job) -> Outcome:
    """Train once; called in a process of its own."""
    task, arm, seed = job
    return train(TASKS[task], arm, seed)


def read(path: Path) -> list[Outcome]:
    """Return the outcomes of a file; none without it."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()]


def completed(jobs: Iterable[Job], path: Path, processes: int) -> list[Outcome]:
    """Return the outcomes of all jobs, from the file or computed."""
    jobs, outcomes = [*jobs], read(path)
    have = {(each.task, each.arm, each.seed) for each in outcomes}
    missing = [job for job in jobs if job not in have]
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with path.open("a") as file, ExitStack() as stack:
        results: Iterable[Outcome] = map(trained, missing)
        if processes > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            results = pool.imap_unordered(trained, missing)
        for count, outcome in enumerate(results, 1):
            outcomes.append(outcome)
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            seconds = time.monotonic() - start
            print(f"\r{count} of {len(missing)}, {seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    wanted = set(jobs)
    return [each for each in outcomes if (each.task, each.arm, each.seed) in wanted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all trainings and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--outcomes", type=Path, default=Path("build/without_tuning.jsonl"))
    parser.add_argument("--save", type=Path)
    options = parser.parse_args(arguments)
    jobs = [
        (task.name, arm, FIRST_SEED + seed)
        for name in options.sets
        for seed in range(options.seeds)
        for task in SETS[name]
        for arm in ARMS
    ]
    outcomes = completed(jobs, options.outcomes, options.processes)
    lines = report(outcomes, options.sets, ARMS, options.seeds)
    print("\n".join(lines))
    save(lines, options.save)


if __name__ == "__main__":
    main()
