"""The tables of all ways to clip, as Markdown; all sentences follow from numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import gradclip
from benchmarks.common.gradients import machine
from benchmarks.common.markdown import table
from benchmarks.experiments.spikes.outcomes import CONFIDENCE
from benchmarks.experiments.without_tuning.arms import AUTO, GRID, NONE
from benchmarks.experiments.without_tuning.catalogue import SETS, UNSEEN
from benchmarks.experiments.without_tuning.outcomes import FIXED, GAIN, Result, results_of
from benchmarks.experiments.without_tuning.task import Task
from benchmarks.experiments.without_tuning.training import OBSERVED_SEED, Outcome

TITLES = {
    "design": "Tasks on which the rule was designed",
    "held out": "Tasks held out from its first form",
    "written last": "Tasks written after its first form was frozen",
    "second round": "Tasks written after its second form was frozen",
    "third round": "More tasks written after its second form was frozen",
}
NEAR = 0.03
"""Regret up to which a way counts as near the best fixed threshold."""
Results = Mapping[str, Mapping[str, Result]]
"""By task and arm."""


def report(
    outcomes: Sequence[Outcome], sets: Sequence[str], arms: Sequence[str], seeds: int
) -> list[str]:
    """Return lines of Markdown.

    Args:
        outcomes: The outcome of every task of the sets, arm and seed.
        sets: Names of sets of tasks, in order.
        arms: The arms, in order; all of `FIXED` and `NONE` among them.
        seeds: Number of seeds.
    """
    results = {
        task.name: results_of(task, [each for each in outcomes if each.task == task.name])
        for name in sets
        for task in SETS[name]
    }
    shown = [arm for arm in arms if arm not in FIXED]
    every = [task for name in sets for task in SETS[name]]
    lines = ["# Clipping without tuning", "", *_preface(seeds), ""]
    lines += ["## Summary", "", *_summary(every, results, shown), ""]
    for name in sets:
        tasks = SETS[name]
        lines += [f"## {TITLES[name]}", "", *_regrets(tasks, results, shown), ""]
    lines += ["## Every arm on every task", ""]
    for name in sets:
        for task in SETS[name]:
            lines += [f"### {task.name}: {task.title}", "", *_details(results[task.name], arms), ""]
    return lines[:-1]


def _preface(seeds: int) -> list[str]:
    facts = {**machine(), "threads": 1, "gradclip": gradclip.__version__}
    facts |= {name: _version(name) for name in ("scikit-learn", "autoclip", "zclip", "smartclip")}
    facts["date"] = date.today().isoformat()
    command = " ".join(["python -m benchmarks.experiments.without_tuning.run", *sys.argv[1:]])
    method = (
        f"{seeds} seeds. The rule auto was designed on the first set of tasks with other seeds, "
        "frozen, and run on the next two. After their results it got its second form, which was "
        "frozen and run on the last two: of these tasks nothing was known. Later its constants "
        f"were rounded. Regret: how much worse than the best of {len(GRID)} fixed thresholds from "
        f"{GRID[0]:g} to {GRID[-1]:g} the mean score is, in percent of it. The best is the "
        "smallest of so many means, so that even a perfect rule has some regret. "
        "failed: a seed diverged, that is it ended worse than a model that learned nothing, or "
        "more than half of what clipping gained was lost, where "
        f"that was more than {GAIN:.0%}. advised: the line that `gradclip report` advises after "
        f"one run with seed {OBSERVED_SEED} that was only measured, or clipped by auto."
    )
    return [
        f"Written by `{command}`, whose docstring describes the method.",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        method,
    ]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _summary(tasks: Sequence[Task], results: Results, arms: Sequence[str]) -> list[str]:
    unseen, calm = [t for t in tasks if t in UNSEEN], [t for t in tasks if not t.explosive]
    groups = {"": unseen, " of all": tasks} if unseen else {"": tasks}
    within = f"within {NEAR:.0%}"
    head = ["arm", *(name + group for group in groups for name in (within, "failed"))]
    rows = []
    for arm in arms:
        cells = [arm]
        for group in groups.values():
            of_arm = [results[task.name][arm] for task in group]
            near = sum(each.regret <= NEAR and not each.failed for each in of_arm)
            failed = sum(each.failed for each in of_arm)
            cells += [f"{count} of {len(group)}" for count in (near, failed)]
        beside = [
            results[task.name][arm].mean / abs(results[task.name][NONE].mean)
            - math.copysign(1, results[task.name][NONE].mean)
            for task in calm
        ]
        rows.append([*cells, _percent(max(beside)) if beside else ""])
    which = f"the {len(unseen)} tasks that the rule had not seen, and of " if unseen else ""
    meaning = (
        f"The number of {which}all {len(tasks)} on which the regret is at most {NEAR:.0%}, and on "
        "which the arm failed. The last column compares with no clipping in percent, at worst on "
        f"the {len(calm)} tasks where no explosion was expected."
    )
    return [meaning, "", *table([*head, "worse than none"], rows)]


def _regrets(tasks: Sequence[Task], results: Results, arms: Sequence[str]) -> list[str]:
    best = [
        min((each for each in results[task.name].values() if each.arm in FIXED), key=_key)
        for task in tasks
    ]
    rows = [["best fixed", *(f"{each.arm}: {each.mean:.4g}" for each in best)]]
    for arm in arms:
        of_arm = [results[task.name][arm] for task in tasks]
        rows.append([f"**{arm}**" if arm == AUTO else arm, *map(_cell, of_arm)])
    meaning = (
        f"Regret in percent, with the half width of its {CONFIDENCE:.0%} interval, paired by seed; "
        "the first row has the best fixed threshold and its mean score."
    )
    return [meaning, "", *table(["arm", *(task.name for task in tasks)], rows)]


def _key(result: Result) -> float:
    return math.inf if result.diverged else result.mean


def _cell(result: Result) -> str:
    regret = f"{_percent(result.regret)} ± {_percent(result.uncertainty)}"
    if not math.isfinite(result.regret):
        return "failed"
    return f"failed ({_percent(result.regret)})" if result.failed else regret


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "not finite"


def _details(results: Mapping[str, Result], arms: Sequence[str]) -> list[str]:
    rows = []
    for arm in arms:
        result = results[arm]
        rate = "" if math.isnan(result.clip_rate) else f"{result.clip_rate:.1%}"
        mean = f"{result.mean:.4g} ± {result.interval:.2g}" if math.isfinite(result.mean) else ""
        rows.append([arm, mean or "not finite", str(result.diverged or ""), rate])
    return table(["arm", "score", "diverged", "steps clipped"], rows)
