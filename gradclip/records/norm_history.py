"""The recent norms before a step, and the norm above which the step is a spike."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

WINDOW = 100
"""Finite norms before a step that its norm is compared with."""
FEWEST = 20
"""Finite norms that are needed before any norm is a spike."""
DEVIATIONS = 10.0
"""Median deviations above the median from which on a norm is a spike."""
ACCURACY = 1e-6
"""Relative accuracy of a norm: an excess smaller than this is rounding."""
SHOWN = 5
"""Norms before the step that a sentence shows, and parameters that it names."""


class NormHistory:
    """The norms before a step, and the answer whether the next norm is a spike.

    Steps without gradients have a norm of 0, which says nothing about usual norms: they are not
    in the window.
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
        """Add the norm of a step. Takes about a microsecond."""
        self._newest.append(norm)
        if not 0 < norm < math.inf:  # false for NaN, too
            return
        if len(self._window) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]
        self._window.append(norm)
        insort(self._sorted, norm)

    @property
    def median(self) -> float:
        """Median of the norms in the window; infinity if there are too few."""
        return _median(self._sorted) if len(self._sorted) >= FEWEST else math.inf

    def deviation(self) -> float:
        """Return the median distance of the norms in the window from their median."""
        median = self.median
        return _median(sorted(abs(norm - median) for norm in self._sorted))

    def is_spike(self, norm: float) -> bool:
        """Return whether a finite norm is more than ten median deviations above the median.

        The deviation is below a tenth of the distance to the norm exactly if more than half of
        the norms lie nearer to the median than that. Counting these takes two searches; only a
        close result needs all 100 distances.
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
    return ordered[middle - 1] / 2 + ordered[middle] / 2  # their sum may overflow
