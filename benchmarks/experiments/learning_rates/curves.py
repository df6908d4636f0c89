"""The curves that are compared: mean final loss by learning rate, for each way to clip."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.experiments.learning_rates.outcomes import Outcome
from benchmarks.experiments.without_tuning.arms import AUTO, NONE

ONE = "1"
GRID = ("0.1", "0.3", ONE, "3", "10")
"""Fixed thresholds; half a decade lies between two."""
ARMS = (NONE, *GRID, AUTO)
"""The ways to clip that are trained."""
BEST = "best of the grid"
CURVES = {**{arm: (arm,) for arm in (NONE, *GRID)}, BEST: GRID, AUTO: (AUTO,)}
"""The ways to clip whose best by mean loss, at each rate, makes up a curve."""
NEAR = 0.1
"""A rate trains if its loss is above the lowest of all by at most this share."""


@dataclass(frozen=True)
class Point:
    """The trainings of all seeds at one learning rate with one way to clip."""

    rate: float
    arm: str
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean loss; infinite if one loss is not finite."""
        return statistics.fmean(self.losses) if all(map(math.isfinite, self.losses)) else math.inf

    def diverged(self, guess: float) -> int:
        """Return the number of seeds whose loss is not finite or above that of a guess."""
        return sum(not loss <= guess for loss in self.losses)


Curve = Sequence[Point]
"""A point for each learning rate, ascending."""


def points_of(outcomes: Iterable[Outcome], network: str) -> dict[tuple[float, str], Point]:
    """Return the points of a network by learning rate and arm."""
    losses: dict[tuple[float, str], list[float]] = {}
    for outcome in outcomes:
        if outcome.network == network:
            losses.setdefault((outcome.rate, outcome.arm), []).append(outcome.loss)
    return {(rate, arm): Point(rate, arm, (*found,)) for (rate, arm), found in losses.items()}


def curves_of(points: dict[tuple[float, str], Point]) -> dict[str, Curve]:
    """Return the curves of `CURVES`."""
    rates = sorted({rate for rate, _ in points})
    return {
        name: [min((points[rate, arm] for arm in arms), key=lambda p: p.mean) for rate in rates]
        for name, arms in CURVES.items()
    }


def lowest(curves: Iterable[Curve]) -> Point:
    """Return the point with the lowest mean loss."""
    return min((point for curve in curves for point in curve), key=lambda point: point.mean)


def rates_that_train(curve: Curve, best: float) -> list[float]:
    """Return the longest run of neighbouring rates with a mean loss near the best.

    Args:
        curve: The curve.
        best: Lowest mean loss of all curves; up to ``(1 + NEAR) * best`` a rate trains.
    """
    longest: list[float] = []
    run: list[float] = []
    for point in curve:
        run = [*run, point.rate] if point.mean <= (1 + NEAR) * best else []
        longest = max(longest, run, key=len)
    return longest


def decades(rates: Sequence[float]) -> float:
    """Return the powers of ten between the first rate and the last; 0 for one rate or none."""
    return math.log10(rates[-1] / rates[0]) if rates else 0.0


def furthest_above(curve: Curve, other: Curve) -> tuple[Point, Point]:
    """Return the points of both at the rate where the first lies highest above the second."""
    return max(
        zip(curve, other, strict=True),
        key=lambda pair: pair[0].mean - pair[1].mean if math.isfinite(pair[1].mean) else -math.inf,
    )
