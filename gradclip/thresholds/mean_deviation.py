"""A threshold above the mean of recent norms by several standard deviations: OLMo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor
from .window import NormWindow, Row, Rows


class MeanDeviation(AdaptiveThreshold):
    """A limit some standard deviations above the mean of the last norms.

    ``threshold = mean + factor std`` of the last norms, without the current one, with the sample
    deviation (n - 1): the rule by which OLMo-core skips steps (6 deviations over 128 norms, with
    ``exceed="skip"``), levanter's update clipping and PyPI's StandardClip.

    It observes norms as measured, those of skipped steps too, as OLMo-core does: a level that rises
    for good is followed. One spike raises the limit for as long as the window holds it;
    `MedianDeviation` does not have this weakness. There is no limit before norm number ``warmup``,
    the current one counted, and never one before the third, since a deviation needs two.

    Memory: ``k window`` norms and ``k`` counts.

    Args:
        factor: How many standard deviations above the mean a norm may be, above 0.
        window: How many of the last norms of a label it uses, 2 or more.
        warmup: From which norm of a label on there is a limit; None for half the window.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_clipped = False

    def __init__(
        self,
        factor: float = 6.0,
        window: int = 128,
        warmup: int | None = None,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.factor = checked_positive("factor", factor)
        self.window = checked_count("window", window, least=2)
        self.warmup = window // 2 if warmup is None else checked_count("warmup", warmup)
        self._ring = NormWindow(self.window)
        self.settles_after = max(self.window, self.warmup)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return self._ring.fresh(count, device, dtype)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        self._ring.follow(self.state)

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return self._ring.limits(norms, self.warmup, self._limit, full=self.settled)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        self._ring.add(norms, observed)

    def _limit(self, recent: Row | Rows) -> Any:
        mean, deviation = recent.mean_and_deviation()
        return mean + self.factor * deviation
