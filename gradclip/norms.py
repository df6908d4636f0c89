"""Buckets of gradients to norms, one per label, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .engines import engine_for, norm_dtype
from .gradients import Bucket
from .places import gathered


def norms_of(
    buckets: Sequence[Bucket],
    order: float,
    *,
    count: int = 1,
    device: torch.device | None = None,
    engine: str = "auto",
    scalar: bool = False,
) -> Tensor:
    """Measure one norm per label.

    No host sync, unless gradients lie on several devices: then their sums meet on one.

    Args:
        buckets: The gradients with the places of their norms. Not written.
        order: p of the p-norm, positive or infinity.
        count: k, how many norms there are; 1 where the gradients have no places.
        device: Where the norms are wanted; by default where the first gradient is, else the CPU.
        engine: Which engine measures.
        scalar: Whether a single norm is wanted 0-d.

    Returns:
        Shape (k,), or () for a scalar, float64 (float32 where the device has no float64); 0 for a
        label without gradients, NaN or infinity where the gradients are not finite.
    """
    if len(buckets) == 1 and not buckets[0].places and device in (None, buckets[0].device):
        serving = engine_for(engine, buckets[0].device)
        return serving.norm(buckets[0].measured, order, scalar=scalar)
    if device is None:
        device = buckets[0].device if buckets else torch.device("cpu")
    if not buckets:
        shape = () if scalar else (count,)
        return torch.zeros(shape, dtype=norm_dtype(device), device=device)
    if not buckets[0].places:
        norms = [engine_for(engine, b.device).norm(b.measured, order) for b in buckets]
        together = _together(norms, device)
        norm: Tensor = torch.linalg.vector_norm(together, order, 0, keepdim=not scalar)
        return norm
    sums = [bucket.power_sums(engine, order) for bucket in buckets]
    places = tuple(place for bucket in buckets for place in bucket.places)
    return gathered(_together(sums, device), order, places, count)


def _together(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Bring what was measured on several devices to one."""
    if len(values) == 1 and values[0].device == device:
        return values[0]
    return torch.cat([value.to(device, norm_dtype(device)) for value in values])
