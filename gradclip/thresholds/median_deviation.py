"""A limit some median deviations above the median of the last norms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .deviation import DeviationThreshold
from .window import WINDOW


class MedianDeviation(DeviationThreshold):
    """A limit some median deviations above the median of the last norms.

    ``threshold = median + factor MAD`` of the last norms, without the current one, where MAD is
    the median distance from the median, without the factor 1.4826 that makes it a standard
    deviation of normally distributed norms. The median of an even number of norms is the mean of
    the two in the middle. Medians as the robust form of `MeanDeviation`: Hampel, "The Influence
    Curve and Its Role in Robust Estimation" (1974).

    It observes norms as measured, those of skipped steps too: a level that rises for good is
    followed once it fills half the window, and a spike moves a median by one place whatever its
    size. Where the median is 0, as of units that are mostly idle, there is no limit: it would
    erase what they learn from. There is no limit before norm number ``warmup``, the current one
    counted, and never one before the third.

    Memory: ``k window`` norms and ``k`` counts.

    Args:
        factor: How many median deviations above the median a norm may be, above 0.
        window: How many norms of a label it looks back, 2 or more.
        warmup: From which norm of a label on it sets a limit; None for half the window.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
    """

    def __init__(
        self,
        factor: float = 10.0,
        window: int = 100,
        warmup: int | None = None,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(factor, window, warmup, cap=cap, floor=floor)

    def of_numbers(self, norms: NDArray[Any]) -> tuple[float, float]:
        """See `DeviationThreshold.of_numbers`."""
        median = _median_of(norms)
        return median if median > 0 else math.inf, _median_of(abs(norms - median))

    def centre_and_deviation(self) -> tuple[Tensor, Tensor]:
        """See `DeviationThreshold.centre_and_deviation`."""
        window, count = self.state[WINDOW], self.kept()
        middle = torch.stack([(count - 1).clamp(min=0) // 2, count // 2], dim=1)
        median = _median(window, middle)
        # Half of the norms lie between the median and the largest number, which free places hold:
        # these are never nearer than the distance in the middle.
        deviation = _median((window - median.unsqueeze(1)).abs(), middle)
        return torch.where(median > 0, median, math.inf), deviation


def _median(norms: Tensor, middle: Tensor) -> Tensor:
    """Return the mean of the two order statistics of each row whose ranks are in ``middle``."""
    lower, upper = norms.sort(dim=1).values.gather(1, middle).unbind(dim=1)
    return lower + (upper - lower) / 2


def _median_of(norms: NDArray[Any]) -> float:
    ordered, count = np.sort(norms), len(norms)
    lower, upper = ordered[(count - 1) // 2].item(), ordered[count // 2].item()
    return float(lower + (upper - lower) / 2)
