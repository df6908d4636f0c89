"""A threshold above the median of recent norms by several median absolute deviations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, or_infinity
from .window import NormWindow, Row, Rows


class MedianDeviation(AdaptiveThreshold):
    """A limit some median deviations above the median of the last norms.

    ``threshold = median + factor MAD`` of the last norms, without the current one, where MAD is
    the median distance from the median, without the factor 1.4826 that makes it a standard
    deviation of normally distributed norms. The median of an even number of norms is the mean of
    the two in the middle. Medians as the robust form of `MeanDeviation`: Hampel, "The Influence
    Curve and Its Role in Robust Estimation" (1974).
    <!-- test: tests/contracts/rules/test_papers.py -k deviations_are;
    tests/contracts/rules/test_contract.py -->

    It observes norms as measured, those of skipped steps too: a level that rises for good is
    followed once it fills half the window, and a spike of any size moves a median by one rank.
    Where the median is 0, as of units that are mostly idle, there is no limit: a limit of 0 would
    erase the gradients that such units learn from.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k 'blinds or rise_for_good or median' -->

    There is no limit before norm number ``warmup``, the current one counted, and never one before
    the third.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k first_steps -->

    Memory: ``k window`` norms and ``k`` counts.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        factor: How many median deviations above the median a norm may be, above 0.
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
        factor: float = 10.0,
        window: int = 100,
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
        median, distance = recent.median_and_distance()
        return or_infinity(median) + self.factor * distance
