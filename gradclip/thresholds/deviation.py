"""What rules share that limit a norm to some deviations above the centre of the last norms."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..checks import checked_count, checked_positive
from .arithmetic import is_number
from .base import StepContext
from .window import COUNTS, WindowThreshold


class DeviationThreshold(WindowThreshold):
    """``threshold = centre + factor deviation`` of the last norms, without the current one.

    Norms of skipped steps are observed too, so that a level that rises for good is followed.

    Args:
        factor: How many deviations above the centre a norm may be, above 0.
        window: How many norms of a label it looks back, 2 or more.
        warmup: From which norm of a label on it sets a limit, the third at the earliest, since
            a deviation needs two; None for half the window.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
    """

    def __init__(
        self,
        factor: float,
        window: int,
        warmup: int | None,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        self.factor = checked_positive("factor", factor)
        self.window = checked_count("window", window, least=2)
        self.warmup = window // 2 if warmup is None else checked_count("warmup", warmup)
        super().__init__(self.window, cap=cap, floor=floor)

    @abstractmethod
    def of_numbers(self, norms: NDArray[Any]) -> tuple[float, float]:
        """Return both for two or more norms of one label."""

    def _limit_of_one(self) -> float:
        if self.state[COUNTS].item() < max(self.warmup, 3) - 1:
            return math.inf
        centre, deviation = self.of_numbers(self.kept_numbers())
        return centre + self.factor * deviation

    @abstractmethod
    def centre_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return both for the norms in the window; of shape (k,), anything before the third."""

    def limits(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Rule.limits`."""
        if is_number(norms):
            return norms.new_tensor([self._limit_of_one()])
        centre, deviation = self.centre_and_deviation()
        active = self.state[COUNTS] >= max(self.warmup, 3) - 1  # the current one counts too
        return torch.where(active, centre + self.factor * deviation, math.inf)
