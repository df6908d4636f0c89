"""The float64 oracle: every verb in its plainest form, for tests and for doubt.

Slow on purpose: one tensor, or one row, after the other, everything converted to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import INFINITY, Engine, norm_dtype, rounded_bounds, rounds_to_one
from .layout import exclusive


class ReferenceEngine(Engine):
    """Computes in float64 what the other engines are held against."""

    name = "reference"

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        sums = [_power_sum(part, order) for part in _parts(tensors, rows)]
        device = tensors[0].device
        return (
            torch.stack(sums) if sums else torch.zeros(0, dtype=norm_dtype(device), device=device)
        )

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`."""
        parts = _parts(tensors, rows)
        each = coefficients.to("cpu", torch.float64).expand(len(parts)).tolist()
        for part, coefficient in zip(parts, each, strict=True):
            if rounds_to_one(coefficient, part.dtype):
                continue
            with exclusive(part) as memory:
                if coefficient == 0:
                    memory.zero_()
                else:
                    memory.copy_(memory.to(norm_dtype(memory.device)) * coefficient)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`."""
        parts = _parts(tensors, rows)
        limits = rounded_bounds(bounds, tensors[0].dtype).expand(len(parts)).tolist()
        for part, limit in zip(parts, limits, strict=True):
            if bool((part.to(norm_dtype(part.device)).abs() > limit).any()):
                with exclusive(part) as memory:
                    memory.clamp_(-limit, limit)


def _parts(tensors: Sequence[Tensor], rows: bool) -> Sequence[Tensor]:
    """Return what has a number of its own: the tensors, or the rows of them all."""
    return [row for tensor in tensors for row in tensor] if rows else tensors


def _power_sum(tensor: Tensor, order: float) -> Tensor:
    magnitudes = tensor.detach().to(norm_dtype(tensor.device)).abs().flatten()
    if not magnitudes.numel():
        return magnitudes.sum()
    return magnitudes.amax() if order == INFINITY else magnitudes.pow(order).sum()
