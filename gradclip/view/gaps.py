"""Gaps in the steps of a log, over which the page draws no line."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDE = 200
"""A distance of neighbouring entries this many times the usual one is a gap. A process that dies
loses at most 100 steps of a log by default: the line goes on where its run is resumed."""
NEIGHBOURS = 9
"""Distances on either side whose median is the usual one. It is that of the place, because a run
may log each step at first and every 500th later; a median, because gaps may be close together."""


def gaps_in(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the indices of the entries that follow a gap.

    The usual distance is the larger of those before and behind. At the ends of a log the nearest
    distances count. A log of two entries has no usual distance, and no gap.

    Args:
        steps: Steps of all entries, rising.
    """
    distances = np.diff(steps)
    count = min(NEIGHBOURS, len(distances))
    if not count:
        return np.empty(0, np.int64)
    # Only a distance far above the least can be a gap: most logs have none to look at.
    wide = np.flatnonzero(distances > WIDE * distances.min())
    windows = np.lib.stride_tricks.sliding_window_view(distances, count)
    places = np.stack([wide - count, wide + 1]).clip(0, len(windows) - 1)
    usual = np.median(windows[places], axis=-1).max(axis=0)
    followed: NDArray[np.int64] = wide[distances[wide] > WIDE * usual] + 1
    return followed
