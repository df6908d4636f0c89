"""What runs with corrupted gradients came to, as means with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
CLEAN = "none"
"""The corruption that is none."""
UNCLIPPED = "no clipping"


@dataclass(frozen=True)
class Pilot:
    """A clean run without clipping, by which a learning rate and a threshold are chosen."""

    model: str
    rate: float
    loss: float
    """On held-out text, at the end; NaN where the run diverged."""
    kind: str
    """What `gradclip report` calls the run."""
    advised: float | None
    """The threshold it advises; None where it advises a rule."""
    median: float
    """Of the norms."""

    @property
    def fixed(self) -> float:
        """The fixed threshold: what is advised, and where that is no number, the median norm."""
        return self.median if self.advised is None else self.advised


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    model: str
    corruption: str
    arm: str
    """How it was clipped."""
    seed: int
    loss: float
    """On held-out text, at the end; not finite where the run diverged."""
    clip_rate: float
    """Share of the steps that were clipped, of those with a finite norm."""
    skipped: int
    """Steps that were left out."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval by Student's t; NaN where there is too little."""

    mean: float
    low: float
    high: float
    above: int
    """How many of the numbers are above 0."""
    count: int

    @property
    def sign(self) -> int:
        """Side of 0 that the whole interval lies on: 1, -1, or 0 where it does not."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Iterable[float]) -> Interval:
    """Return the mean of some finite numbers with its interval."""
    known = np.asarray([*values], dtype=np.float64)
    mean = float(known.mean()) if len(known) else math.nan
    half = math.nan
    if len(known) > 1:
        half = student_t(len(known) - 1) * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, int((known > 0).sum()), len(known))


def student_t(freedom: int) -> float:
    """Return by how many standard errors an interval reaches to each side.

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
    """All seeds of one model, one corruption and one way to clip."""

    model: str
    corruption: str
    arm: str
    losses: tuple[float, ...]
    """In the order of the seeds."""
    clean: tuple[float, ...]
    """Losses of the runs without corruption, in the same order."""
    clip_rate: float
    skipped: float
    """Mean of the steps that were left out."""

    @property
    def diverged(self) -> int:
        """How many losses are not finite."""
        return sum(not math.isfinite(loss) for loss in self.losses)

    @property
    def loss(self) -> Interval:
        """The loss of those that did not diverge."""
        return interval(loss for loss in self.losses if math.isfinite(loss))

    @property
    def change(self) -> Interval:
        """The loss minus that of the clean run of the same seed, where both are finite."""
        return difference(self.losses, self.clean)


def difference(losses: Sequence[float], others: Sequence[float]) -> Interval:
    """Return by how much losses are higher than others, in pairs that are finite."""
    changes = (loss - other for loss, other in zip(losses, others, strict=True))
    return interval(change for change in changes if math.isfinite(change))


def rows_of(outcomes: Iterable[Outcome]) -> list[Row]:
    """Return runs that differ in nothing but the seed together, in the order in which they come."""
    together: dict[tuple[str, str, str], list[Outcome]] = {}
    for each in outcomes:
        together.setdefault((each.model, each.corruption, each.arm), []).append(each)
    rows = []
    for (model, corruption, arm), runs in together.items():
        runs.sort(key=lambda run: run.seed)
        clean = sorted(together[model, CLEAN, arm], key=lambda run: run.seed)
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
    """Return the models, corruptions or arms of some rows, each once, in their order."""
    return [*dict.fromkeys(getattr(row, field) for row in rows)]
