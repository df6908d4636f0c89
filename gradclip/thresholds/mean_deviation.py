"""A limit some standard deviations above the mean of the last norms: OLMo's skipped steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .deviation import DeviationThreshold
from .window import WINDOW


class MeanDeviation(DeviationThreshold):
    """A limit some standard deviations above the mean of the last norms.

    ``threshold = mean + factor std`` of the last norms, without the current one, with the sample
    deviation (n - 1): the rule by which OLMo-core skips steps (6 deviations over 128 norms, with
    ``exceed="skip"``), levanter's update clipping and PyPI's StandardClip.

    It observes norms as measured, those of skipped steps too, as OLMo-core does. One spike
    therefore raises the limit for as long as the window holds it; `MedianDeviation` does not have
    this weakness. There is no limit before norm number ``warmup``, the current one counted, and
    never one before the third, since a deviation needs two.

    Memory: ``k window`` norms and ``k`` counts.

    Args:
        factor: How many standard deviations above the mean a norm may be, above 0.
        window: How many norms of a label it looks back, 2 or more.
        warmup: From which norm of a label on it sets a limit; None for half the window.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
    """

    def __init__(
        self,
        factor: float = 6.0,
        window: int = 128,
        warmup: int | None = None,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(factor, window, warmup, cap=cap, floor=floor)

    def of_numbers(self, norms: NDArray[Any]) -> tuple[float, float]:
        """See `DeviationThreshold.of_numbers`."""
        kept = norms.tolist()
        mean = sum(kept) / len(kept)
        squares = sum((norm - mean) * (norm - mean) for norm in kept)
        return mean, math.sqrt(squares / (len(kept) - 1))

    def centre_and_deviation(self) -> tuple[Tensor, Tensor]:
        """See `DeviationThreshold.centre_and_deviation`."""
        window, filled = self.state[WINDOW], self.filled()
        count = self.kept().to(window.dtype)
        mean = torch.where(filled, window, 0.0).sum(dim=1) / count
        # From the mean itself: a sum of squares would lose what differs, a running one drift.
        distance = torch.where(filled, window - mean.unsqueeze(1), 0.0)
        return mean, torch.linalg.vector_norm(distance, dim=1) / (count - 1).sqrt()
