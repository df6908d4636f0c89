"""Curves of any length as a picture shows them: no more points than it has room for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..run import Run

COLUMNS = 2000
"""Parts that the steps of a long run are divided into, more than a panel has pixels."""


@dataclass(frozen=True)
class Envelope:
    """The smallest and the largest value in each part of the steps, NaN where there is none."""

    steps: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def line(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The curve that runs through all of them, as steps and values."""
        if np.array_equal(self.low, self.high, equal_nan=True):
            return self.steps, self.high
        return np.repeat(self.steps, 2), np.column_stack((self.low, self.high)).ravel()

    @property
    def isolated(self) -> NDArray[np.bool_]:
        """Which parts have a value where neither neighbour has one, so that no line shows them."""
        known: NDArray[np.bool_] = np.pad(~np.isnan(self.high), 1)
        return known[1:-1] & ~known[:-2] & ~known[2:]


def envelope(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Envelope:
    """Return a curve as a picture shows it: no spike is lost, however many steps there are.

    Args:
        steps: Indices of the steps, rising.
        values: NaN where the curve has a gap.
    """
    places = steps.astype(np.float64)
    if len(steps) <= 2 * COLUMNS:
        return Envelope(places, values, values)
    first, last = places[0], places[-1]
    parts = np.minimum((places - first) * (COLUMNS / (last - first)), COLUMNS - 1).astype(np.int64)
    begins = np.flatnonzero(np.diff(parts, prepend=-1))
    low, high = np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins)
    middle = first + (parts[begins] + 0.5) * ((last - first) / COLUMNS)
    return Envelope(middle, low, high)


def thinned(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return some of the steps, so that marks at them look as if they were at all of them."""
    if len(steps) <= COLUMNS:
        return steps
    parts = (steps - steps[0]).astype(np.float64) * (COLUMNS / float(steps[-1] - steps[0]))
    begins: NDArray[np.bool_] = np.diff(parts.astype(np.int64), prepend=-1) > 0
    return steps[begins]


def window_of(run: Run) -> int:
    """Return over how many steps the clip rate of a run is drawn: a hundredth, at least 20."""
    wanted = max(len(run) / 100, 20.0)
    scale = int(10 ** (len(str(int(wanted))) - 1))
    rounded = next(digit * scale for digit in (1, 2, 5, 10) if digit * scale >= wanted)
    return min(rounded, len(run))


def running_clip_rate(run: Run, window: int) -> NDArray[np.float64]:
    """Return the share of the finite norms that were clipped, over the steps up to each.

    Args:
        run: The run.
        window: How many steps; at the beginning there are fewer.
    """
    clipped, finite = _sums(run.clipped, window), _sums(run.finite, window)
    return np.where(finite > 0, clipped / np.maximum(finite, 1), np.nan)


def _sums(flags: NDArray[np.bool_], window: int) -> NDArray[np.int64]:
    """Return how many of the last flags are set, at each."""
    sums = np.cumsum(flags, dtype=np.int64)
    sums[window:] -= sums[:-window].copy()
    return sums


def positive(values: ArrayLike) -> NDArray[np.float64]:
    """Return the values that a logarithmic axis can show, and NaN in place of the others.

    Norms at the ends of the range of float64 are moved by a little: pictures need a margin there.
    """
    found = np.asarray(values, dtype=np.float64)
    return np.where((found > 0) & np.isfinite(found), np.clip(found, 1e-300, 1e300), np.nan)
