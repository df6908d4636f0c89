"""Results of trainings with corrupted gradients: means with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
CLEAN = "none"
"""Name of the trainings without corruption."""
UNCLIPPED = "no clipping"


@dataclass(frozen=True)
class Pilot:
    """A clean run without clipping, which decides the learning rate and the fixed threshold."""

    model: str
    rate: float
    loss: float
    """Final loss on held-out text; NaN if the run diverged."""
    kind: str
    """Kind of run according to `gradclip report`."""
    advised: float | None
    """The number that the report names; None if none fits."""
    median: float
    """Median norm."""

    @property
    def fixed(self) -> float:
        """The fixed threshold: the number that the report names, or the median norm."""
        return self.median if self.advised is None else self.advised


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    model: str
    corruption: str
    arm: str
    """The way it was clipped."""
    seed: int
    loss: float
    """Final loss on held-out text; not finite if the run diverged."""
    clip_rate: float
    """Share of the steps with a finite norm that were clipped."""
    skipped: int
    """Number of skipped steps."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval by Student's t; NaN for fewer than two values."""

    mean: float
    low: float
    high: float
    above: int
    """Number of values above 0."""
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Iterable[float]) -> Interval:
    """Return the mean of some finite values with its interval."""
    numbers = np.asarray([*values], dtype=np.float64)
    mean = float(numbers.mean()) if len(numbers) else math.nan
    half = math.nan
    if len(numbers) > 1:
        half = student_t(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(mean, mean - half, mean + half, int((numbers > 0).sum()), len(numbers))


def student_t(freedom: int) -> float:
    """Return the half width of an interval in standard errors.

    With ``t = sqrt(freedom) tan(angle)`` the density of Student's t is proportional to
    ``cos(angle) ** (freedom - 1)``.
    """
    angles = np.linspace(0, np.pi / 2, 100_001)
    middles = (angles[1:] + angles[:-1]) / 2
    share = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1))])
    angle = np.interp(CONFIDENCE, share / share[-1], angles)
    return float(math.sqrt(freedom) * np.tan(angle))


@dataclass(frozen=True)
class Row:
    """The runs of all seeds with one model, one corruption and one way to clip."""

    model: str
    corruption: str
    arm: str
    losses: tuple[float, ...]
    """In the order of the seeds."""
    clean: tuple[float, ...]
    """Losses of the runs without corruption, in the same order."""
    clip_rate: float
    skipped: float
    """Mean number of skipped steps."""

    @property
    def diverged(self) -> int:
        """Number of losses that are not finite."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    @property
    def loss(self) -> Interval:
        """The loss of the runs that did not diverge."""
        return interval(loss for loss in self.losses if math.isfinite(loss))

    @property
    def change(self) -> Interval:
        """The loss minus that of the clean run of the same seed, where both are finite."""
        return difference(self.losses, self.clean)


def difference(losses: Sequence[float], others: Sequence[float]) -> Interval:
    """Return the difference between paired losses, over the pairs that are finite."""
    changes = (loss - other for loss, other in zip(losses, others, strict=True))
    return interval(change for change in changes if math.isfinite(change))


def rows_of(outcomes: Iterable[Outcome]) -> list[Row]:
    """Return a row for all runs that differ only in the seed, in the order of the runs."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.model, outcome.corruption, outcome.arm), []).append(outcome)
    rows = []
    for (model, corruption, arm), runs in groups.items():
        runs.sort(key=lambda run: run.seed)
        clean = sorted(groups[model, CLEAN, arm], key=lambda run: run.seed)
        row = Row(
            model,
            corruption,
            arm,
            tuple(run.loss for run in runs),
            tuple(run.loss for run in clean),
            float(np.mean([run.clip_rate for run in runs])),
            float(np.mean([run.skipped for run in runs])),
        )
        rows.append(row)
    return rows


def names_of(rows: Iterable[Row], field: str) -> list[str]:
    """Return the distinct models, corruptions or arms of some rows, in their order."""
    return [*dict.fromkeys(getattr(row, field) for row in rows)]
