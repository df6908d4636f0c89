"""One threshold for all steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import checked_bound
from .base import StepContext, Threshold


class Fixed(Threshold):
    """The same threshold at every step: Pascanu, Mikolov and Bengio (2013).

    Args:
        max_norm: Largest norm allowed, 0 or more; None for no limit.

    Raises:
        ArgumentError: ``max_norm`` is negative, NaN, infinite or no number.
    """

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = None if max_norm is None else checked_bound("max_norm", max_norm)
        self._cached = torch.empty(0, device="cpu")

    def __repr__(self) -> str:
        return f"Fixed({self.max_norm!r})"

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Threshold.thresholds`."""
        like = self._cached
        if like.shape != norms.shape or like.device != norms.device or like.dtype != norms.dtype:
            limit = math.inf if self.max_norm is None else self.max_norm
            self._cached = torch.full_like(norms, limit)
        return self._cached
