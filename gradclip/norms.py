"""Buckets of gradients to norms, one per label, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engines import engine_for, norm_dtype
from .engines.base import INFINITY
from .gradients import Bucket


def norms_of(
    buckets: Sequence[Bucket],
    order: float,
    *,
    count: int = 1,
    device: torch.device | None = None,
    engine: str = "auto",
) -> Tensor:
    """Measure one norm per label.

    No host sync, unless gradients lie on several devices: then their sums meet on one.

    Args:
        buckets: The gradients with their labels. Not written.
        order: p of the p-norm, positive or infinity.
        count: k, how many labels there are.
        device: Where the norms are wanted; by default where the first gradient is, else the CPU.
        engine: Which engine measures.

    Returns:
        Shape (k,), float64 (float32 where the device has no float64); 0 for a label without
        gradients, NaN or infinity where the gradients are not finite.
    """
    if device is None:
        device = buckets[0].device if buckets else torch.device("cpu")
    if not buckets:
        return torch.zeros(count, dtype=norm_dtype(device), device=device)
    joint = count == 1
    sums = [
        engine_for(engine, b.device).power_sums(b.measured, order, joint=joint) for b in buckets
    ]
    if len(sums) > 1 or sums[0].device != device:
        sums = [torch.cat([s.to(device, norm_dtype(device)) for s in sums])]
    totals = _totals(sums[0], buckets, order, count)
    return totals if order == INFINITY else _root(totals, order)


def _totals(sums: Tensor, buckets: Sequence[Bucket], order: float, count: int) -> Tensor:
    """Combine the power sums of all gradients with the same label."""
    if count == 1:
        if sums.numel() == 1:
            return sums
        return sums.amax(0, keepdim=True) if order == INFINITY else sums.sum(0, keepdim=True)
    labels = [label for bucket in buckets for label in bucket.labels]
    index = torch.tensor(labels, dtype=torch.int64, device=sums.device)
    totals = torch.zeros(count, dtype=sums.dtype, device=sums.device)
    if order == INFINITY:
        return totals.scatter_reduce_(0, index, sums, "amax")
    return totals.index_add_(0, index, sums)


def _root(totals: Tensor, order: float) -> Tensor:
    return totals.sqrt_() if order == 2 else totals.pow_(1 / order)
