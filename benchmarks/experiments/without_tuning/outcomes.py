"""What the outcomes of a task say: means, intervals, regret, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.experiments.spikes.outcomes import interval
from benchmarks.experiments.without_tuning.arms import GRID, NONE
from benchmarks.experiments.without_tuning.task import Task
from benchmarks.experiments.without_tuning.training import Outcome, diverged

FIXED = tuple(f"{threshold:g}" for threshold in GRID)
GAIN = 0.03
"""What clipping must gain on a task, relative, for half of it to decide about a failure."""


@dataclass(frozen=True)
class Result:
    """A way to clip on a task."""

    arm: str
    mean: float
    """Mean score of the seeds; NaN if one of them is not finite."""
    interval: float
    """Half width of the interval of the mean."""
    diverged: int
    """Number of seeds that ended worse than one that learned nothing."""
    clip_rate: float
    regret: float
    """How much worse than the best fixed threshold the mean is, relative to it."""
    uncertainty: float
    """Half width of the interval of the regret, paired by seed."""
    failed: bool
    """True if a seed diverged, or if more than half of what clipping gained was lost."""


def results_of(task: Task, outcomes: Sequence[Outcome]) -> dict[str, Result]:
    """Return the result of each arm.

    Args:
        task: The task.
        outcomes: All outcomes of this task; the same seeds for each arm.
    """
    scores: dict[str, dict[int, float]] = {}
    rates: dict[str, list[float]] = {}
    for outcome in outcomes:
        scores.setdefault(outcome.arm, {})[outcome.seed] = outcome.score
        rates.setdefault(outcome.arm, []).append(outcome.clip_rate)
    arrays = {
        arm: np.array([by_seed[seed] for seed in sorted(by_seed)])
        for arm, by_seed in scores.items()
    }
    lost = {arm: sum(diverged(task, score) for score in all_) for arm, all_ in arrays.items()}
    best = min((arm for arm in FIXED if not lost[arm]), key=lambda arm: float(arrays[arm].mean()))
    scale = abs(float(arrays[best].mean()))
    regrets = {arm: float((all_ - arrays[best]).mean()) / scale for arm, all_ in arrays.items()}
    none = (task.chance - float(arrays[best].mean())) / scale if lost[NONE] else regrets[NONE]
    results = {}
    for arm, all_ in arrays.items():
        half_lost = none > GAIN and not regrets[arm] <= none / 2
        results[arm] = Result(
            arm,
            float(all_.mean()),
            half_width(all_),
            lost[arm],
            float(np.mean(rates[arm])),
            regrets[arm],
            half_width(all_ - arrays[best]) / scale,
            lost[arm] > 0 or half_lost,
        )
    return results


def half_width(values: NDArray[np.float64]) -> float:
    """Return half the width of the interval of the mean; NaN if a value is not finite."""
    if not np.isfinite(values).all():
        return math.nan
    of_mean = interval(values)
    return (of_mean.high - of_mean.low) / 2
