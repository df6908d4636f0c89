"""The norms before a step, and the line above which the next one is a spike."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

WINDOW = 100
"""Finite norms that a norm is held against: those before it."""
FEWEST = 20
"""How many there have to be."""
DEVIATIONS = 10.0
"""Median deviations above their median from which a norm is a spike."""
ACCURACY = 1e-6
"""To which norms are right: one that is above others by less is not above them."""
SHOWN = 5
"""Norms before the step that are shown, and parameters that carry most of its own."""


class NormHistory:
    """The norms before a step, and whether the next one is a spike.

    Norms of 0, of steps without gradients, tell nothing of what is usual, and are not among those
    that others are held against.
    """

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=SHOWN)
        self._window: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._window)

    def __str__(self) -> str:
        return ", ".join(f"{norm:.4g}" for norm in self._newest) or "not known"

    def add(self, norm: float) -> None:
        """Take over the norm of a step. Takes about a microsecond."""
        self._newest.append(norm)
        if not 0 < norm < math.inf:
            return
        if len(self._window) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]
        self._window.append(norm)
        insort(self._sorted, norm)

    @property
    def median(self) -> float:
        """The median of the last finite norms; infinity where there are too few."""
        return _median(self._sorted) if len(self._sorted) >= FEWEST else math.inf

    def deviation(self) -> float:
        """Return the median of their distances from it."""
        median = self.median
        return _median(sorted(abs(norm - median) for norm in self._sorted))

    def is_spike(self, norm: float) -> bool:
        """Tell whether a finite norm is more than ten median deviations above the median.

        Told without the deviation where that many norms are nearer to the median than a tenth of
        the way to this one: two searches in place of 100 distances.
        """
        median = self.median
        if not norm > median * (1 + ACCURACY):
            return False
        near = (norm - median) / DEVIATIONS
        first, end = median - near, median + near
        nearer = bisect_left(self._sorted, end) - bisect_right(self._sorted, first)
        half = len(self._sorted) / 2
        if abs(nearer - half) > 1:
            return nearer > half
        return norm > median + DEVIATIONS * self.deviation()


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return ordered[middle - 1] / 2 + ordered[middle] / 2
