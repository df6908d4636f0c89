"""The float64 oracle: every verb in its plainest form, for tests and for doubt.

Slow on purpose: one tensor after the other, everything converted to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import INFINITY, Engine, norm_dtype, rounded_bound, rounds_to_one
from .memory import exclusive


class ReferenceEngine(Engine):
    """Computes in float64 what the other engines are held against."""

    name = "reference"

    def power_sums(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """See `Engine.power_sums`."""
        return torch.stack([self._power_sum(tensor, order) for tensor in tensors])

    def scale_(self, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
        """See `Engine.scale_`."""
        each = coefficients.to("cpu", torch.float64).expand(len(tensors)).tolist()
        for tensor, coefficient in zip(tensors, each, strict=True):
            if rounds_to_one(coefficient, tensor.dtype):
                continue
            with exclusive(tensor) as memory:
                if coefficient == 0:
                    memory.zero_()
                else:
                    memory.copy_(memory.to(norm_dtype(memory.device)) * coefficient)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor) -> None:
        """See `Engine.clamp_`."""
        for tensor, bound in zip(tensors, bounds.expand(len(tensors)).tolist(), strict=True):
            limit = rounded_bound(bound, tensor.dtype)
            if bool((tensor.to(norm_dtype(tensor.device)).abs() > limit).any()):
                with exclusive(tensor) as memory:
                    memory.clamp_(-limit, limit)

    @staticmethod
    def _power_sum(tensor: Tensor, order: float) -> Tensor:
        magnitudes = tensor.detach().to(norm_dtype(tensor.device)).abs().flatten()
        if not magnitudes.numel():
            return magnitudes.sum()
        return magnitudes.amax() if order == INFINITY else magnitudes.pow(order).sum()
