"""The clip rate over the last steps, as pictures and the page show it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .run import Run


def window_of(run: Run) -> int:
    """Return the window of the clip rate: a hundredth of the steps, round, and at least 20."""
    wanted = max(len(run) / 100, 20.0)
    scale = int(10 ** (len(str(int(wanted))) - 1))
    rounded = next(digit * scale for digit in (1, 2, 5, 10) if digit * scale >= wanted)
    return min(rounded, len(run))


def running_clip_rate(run: Run, window: int) -> NDArray[np.float64]:
    """Return at each step the share of clipped norms among the finite ones of the last steps.

    Args:
        run: The run.
        window: Number of steps; the first steps have fewer before them.
    """
    clipped, finite = _running_sums(run.clipped, window), _running_sums(run.finite, window)
    return np.where(finite > 0, clipped / np.maximum(finite, 1), np.nan)


def _running_sums(flags: NDArray[np.bool_], window: int) -> NDArray[np.int64]:
    sums = np.cumsum(flags, dtype=np.int64)
    sums[window:] -= sums[:-window].copy()  # a copy: the slices overlap
    return sums
