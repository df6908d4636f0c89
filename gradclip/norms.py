"""Buckets of gradients to norms, one per label, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .capture import capturing
from .engines import engine_for, norm_dtype
from .engines.base import INFINITY, root
from .gradients import Bucket
from .places import gathered, owners
from .ranks import Group


def norms_of(
    buckets: Sequence[Bucket],
    order: float,
    *,
    count: int = 1,
    device: torch.device | None = None,
    engine: str = "auto",
    scalar: bool = False,
    parts: list[Tensor] | None = None,
    groups: Sequence[Group] = (),
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
        parts: Takes the power sum of every gradient, bucket by bucket, in fresh memory; no bit of
            the norms depends on it.
        groups: The ranks that gradients are spread over: this is called on each of them, and the
            collective of each group is entered, whether or not there are gradients here.

    Returns:
        Shape (k,), or () for a scalar, float64 (float32 where the device has no float64); 0 for a
        label without gradients, NaN or infinity where the gradients are not finite.
    """
    if groups:
        device = device or (buckets[0].device if buckets else torch.device("cpu"))
        total = _sums_across(groups, buckets, order, count, device, engine)
        total = total if order == INFINITY else root(total, order)
        return total.squeeze(0) if scalar else total
    single = len(buckets) == 1 and not buckets[0].places and device in (None, buckets[0].device)
    if single and parts is None:
        serving = engine_for(engine, buckets[0].device)
        return serving.norm(buckets[0].measured, order, scalar=scalar)
    if device is None:
        device = buckets[0].device if buckets else torch.device("cpu")
    if not buckets:
        shape = () if scalar else (count,)
        return torch.zeros(shape, dtype=norm_dtype(device), device=device)
    if not buckets[0].places:
        norms = [_norm(bucket, order, engine, parts) for bucket in buckets]
        if single:
            return norms[0].squeeze(0) if scalar else norms[0]
        together = _together(norms, device)
        norm: Tensor = torch.linalg.vector_norm(together, order, 0, keepdim=not scalar)
        return norm
    sums = [bucket.power_sums(engine, order) for bucket in buckets]
    if parts is not None:
        parts += map(partial(_of_gradients, order), sums, buckets)
    total = _total(sums, buckets, order, count, device)
    return total if order == INFINITY else root(total, order)


def _sums_across(
    groups: Sequence[Group],
    buckets: Sequence[Bucket],
    order: float,
    count: int,
    device: torch.device,
    engine: str,
) -> Tensor:
    """Return the power sums of the norms, the same on all ranks. One collective for each group.

    What is on one rank alone, or the same on all, is in no group and added afterwards.
    """
    found = []
    alone = any(bucket.group is None for bucket in buckets)
    for group in (None, *groups) if alone else groups:
        own = [bucket for bucket in buckets if bucket.group == group and bucket.counts]
        sums = [bucket.power_sums(engine, order) for bucket in own]
        local = _total(sums, own, order, count, device)
        found.append(local if group is None else group.reduced(local, order))
    if len(found) == 1:
        return found[0]
    together = torch.stack(found)
    return together.amax(0) if order == INFINITY else together.sum(0)


def _total(
    sums: Sequence[Tensor],
    buckets: Sequence[Bucket],
    order: float,
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the power sums of the norms from those of their parts, shape (k,)."""
    if not buckets:
        return torch.zeros(count, dtype=norm_dtype(device), device=device)
    together = _together(sums, device)
    if buckets[0].places:
        places = tuple(place for bucket in buckets for place in bucket.places)
        return gathered(together, order, places, count)
    return together.amax(0, keepdim=True) if order == INFINITY else together.sum(0, keepdim=True)


def _norm(bucket: Bucket, order: float, engine: str, parts: list[Tensor] | None) -> Tensor:
    serving = engine_for(engine, bucket.device)
    if parts is None:
        return serving.norm(bucket.measured, order)
    norm, sums = serving.norm_and_sums(bucket.measured, order)
    parts.append(sums)
    return norm


def _of_gradients(order: float, sums: Tensor, bucket: Bucket) -> Tensor:
    """Return the power sums of gradients from theirs, or from those of their rows in some norm."""
    if capturing():
        return sums  # nobody reads what a graph measures of parameters
    sums = sums.clone()  # the norms will be in their memory
    if not bucket.rows:
        return sums
    places = tuple(bucket.places)
    return gathered(sums, order, owners(places), len(places))


def _together(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Bring what was measured on several devices to one."""
    if len(values) == 1 and values[0].device == device:
        return values[0]
    return torch.cat([value.to(device, norm_dtype(device)) for value in values])
