"""The reference engine: the plain float64 form of every operation, for tests and comparison.

It is slow on purpose: it converts one tensor, or one row, after the other to float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import INFINITY, Engine, norm_dtype, rounded_bounds, rounds_to_one
from .layout import writable


class ReferenceEngine(Engine):
    """Computes in float64 the results that the other engines are compared with."""

    name = "reference"

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        sums = [_power_sum(tensor, order) for tensor in _unbound(tensors, rows)]
        device = tensors[0].device
        return (
            torch.stack(sums) if sums else torch.zeros(0, dtype=norm_dtype(device), device=device)
        )

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`."""
        targets = _unbound(tensors, rows)
        factors = coefficients.to("cpu", torch.float64).expand(len(targets)).tolist()
        for target, factor in zip(targets, factors, strict=True):
            if rounds_to_one(factor, target.dtype):
                continue
            with writable(target) as memory:
                if factor == 0:
                    memory.zero_()  # a product would keep NaN and infinity
                else:
                    memory.copy_(memory.to(norm_dtype(memory.device)) * factor)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`."""
        targets = _unbound(tensors, rows)
        rounded = rounded_bounds(bounds, tensors[0].dtype).expand(len(targets)).tolist()
        for target, bound in zip(targets, rounded, strict=True):
            if bool((target.to(norm_dtype(target.device)).abs() > bound).any()):
                with writable(target) as memory:
                    memory.clamp_(-bound, bound)


def _unbound(tensors: Sequence[Tensor], rows: bool) -> Sequence[Tensor]:
    """Return the tensors, or the rows of all of them."""
    return [row for tensor in tensors for row in tensor] if rows else tensors


def _power_sum(tensor: Tensor, order: float) -> Tensor:
    magnitudes = tensor.detach().to(norm_dtype(tensor.device)).abs().flatten()
    if not magnitudes.numel():
        return magnitudes.sum()
    return magnitudes.amax() if order == INFINITY else magnitudes.pow(order).sum()
