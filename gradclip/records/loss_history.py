"""The recent losses before a step, and the loss above which the step is a loss spike."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 128
"""Finite losses before a step that its loss is compared with."""
FEWEST = 63
"""Finite losses that are needed before any loss is a spike."""
DEVIATIONS = 6.0
"""Standard deviations above the mean from which on a loss is a spike."""
ACCURACY = 1e-6
"""An excess over the mean that is a smaller share of it is rounding: losses may be constant."""


class LossHistory:
    """The losses before a step, and the answer whether the next loss is a spike.

    A spike is above the mean of the last 128 finite losses plus six standard deviations, from loss
    number 64 on: the line above which OLMo-core skips a step.
    """

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)

    def __len__(self) -> int:
        return len(self._window)

    def add(self, loss: float) -> None:
        """Add the loss of a step; one that is not finite is not kept."""
        if math.isfinite(loss):
            self._window.append(loss)

    @property
    def newest(self) -> float | None:
        """The last finite loss; None before the first."""
        return self._window[-1] if self._window else None

    def mean(self) -> float:
        """Return the mean of the losses in the window, which has at least one."""
        return sum(self._window) / len(self._window)

    def line(self) -> float:
        """Return the mean plus six sample deviations; infinity if there are too few losses."""
        count = len(self._window)
        if count < FEWEST:
            return math.inf
        mean = self.mean()
        deviation = math.dist(self._window, [mean] * count) / math.sqrt(count - 1)
        return mean + DEVIATIONS * deviation

    def is_spike(self, loss: float) -> bool:
        """Return whether a finite loss is above the line."""
        if len(self._window) < FEWEST:
            return False
        mean = self.mean()  # most losses are not above it, and need no deviation
        return loss > mean + ACCURACY * abs(mean) and loss > self.line()
