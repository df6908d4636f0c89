"""One threshold for all steps."""

from __future__ import annotations

import math

import torch

from ..checks import checked_bound
from .base import Rule, StepContext
from .numbers import NumberOrTensor


class Fixed(Rule):
    """The same threshold at every step: Pascanu, Mikolov and Bengio (2013).

    It learns nothing and keeps no state.
    <!-- test: tests/contracts/rules/test_contract.py -k without_state -->

    Args:
        max_norm: Largest norm allowed, 0 or more; None for no limit.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: ``max_norm`` is negative, NaN, infinite or not a number.

    <!-- test: tests/behaviour/thresholds/test_given.py -->
    """

    def __init__(
        self, max_norm: float | None, *, cap: float | None = None, floor: float | None = None
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.max_norm = None if max_norm is None else checked_bound("max_norm", max_norm)
        self._cached = torch.empty(0, device="cpu")

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        limit = math.inf if self.max_norm is None else self.max_norm
        if isinstance(norms, float):
            return limit
        like = self._cached  # the same tensor for every record: nobody writes a threshold
        if like.shape != norms.shape or like.device != norms.device or like.dtype != norms.dtype:
            self._cached = torch.full_like(norms, limit)
        return self._cached
