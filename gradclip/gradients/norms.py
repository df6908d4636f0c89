"""Buckets of gradients to norms, one per label, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..engines import engine_for, norm_dtype
from ..engines.base import INFINITY, root
from ..engines.cuda_graphs import capturing
from ..ranks.groups import NormRanks, RankGroup, norm_ranks_of
from ..scopes.norm_indices import NormIndices, gradient_indices, sums_by_norm
from .buckets import Bucket


def norms_of(
    buckets: Sequence[Bucket],
    order: float,
    *,
    count: int = 1,
    device: torch.device | None = None,
    engine: str = "auto",
    scalar: bool = False,
    parts: list[Tensor] | None = None,
    groups: Sequence[RankGroup] = (),
) -> Tensor:
    """Measure one norm per label.

    No host sync, unless gradients lie on several devices: then their sums meet on one.

    Args:
        buckets: The gradients with the indices of their norms. Not written.
        order: p of the p-norm, positive or infinity.
        count: k, how many norms there are; 1 where the gradients have no norm indices.
        device: Where the norms are wanted; by default where the first gradient is, else the CPU.
        engine: Which engine measures.
        scalar: Whether a single norm is wanted 0-d.
        parts: Takes the power sum of every gradient, bucket by bucket, in fresh memory; no bit of
            the norms depends on it.
        groups: Ranks whose collective is entered also where none of their gradients is here. Those
            that gradients are spread over need not be among them; this is called on all of them.

    Returns:
        Shape (k,), or () for a scalar, float64 (float32 where the device has no float64); 0 for a
        label without gradients, NaN or infinity where the gradients are not finite.
    """
    spread = {bucket.group for bucket in buckets if bucket.group is not None}.union(groups)
    if spread:
        device = device or (buckets[0].device if buckets else torch.device("cpu"))
        found = measure_across_ranks(
            buckets, order, norm_ranks_of(spread), count=count, device=device, engine=engine
        )
        return found.norms.squeeze(0) if scalar else found.norms
    single = (
        len(buckets) == 1 and not buckets[0].norm_indices and device in (None, buckets[0].device)
    )
    if single and parts is None:
        serving = engine_for(engine, buckets[0].device)
        return serving.norm(buckets[0].measured, order, scalar=scalar)
    if device is None:
        device = buckets[0].device if buckets else torch.device("cpu")
    if not buckets:
        shape = () if scalar else (count,)
        return torch.zeros(shape, dtype=norm_dtype(device), device=device)
    if not buckets[0].norm_indices:
        norms = [_norm(bucket, order, engine, parts) for bucket in buckets]
        if single:
            return norms[0].squeeze(0) if scalar else norms[0]
        together = _together(norms, device)
        norm: Tensor = torch.linalg.vector_norm(together, order, 0, keepdim=not scalar)
        return norm
    sums = [bucket.power_sums(engine, order) for bucket in buckets]
    if parts is not None:
        parts += map(partial(_of_gradients, order), sums, buckets)
    return _norms(_total(sums, buckets, order, count, device), order)


@dataclass(frozen=True, slots=True)
class SharedNorms:
    """What several ranks have found together, the same bits on all of them."""

    norms: Tensor
    """Shape (k,)."""
    parts: Tensor | None = None
    """The power sums of the gradients of all parameters."""
    weight_norms: Tensor | None = None
    """Of the parameters, shape (k,)."""
    present: Tensor | None = None
    """Which of the norms have a gradient behind them on some rank; shape (k,), bool."""


def measure_across_ranks(
    buckets: Sequence[Bucket],
    order: float,
    norm_ranks: NormRanks,
    *,
    count: int,
    device: torch.device,
    engine: str,
    parts: tuple[tuple[NormIndices, ...], int] | None = None,
    weights: Sequence[Bucket] | None = None,
    present: Tensor | None = None,
) -> SharedNorms:
    """Measure one norm per label over several ranks. One collective for each of their groups.

    Args:
        buckets: The gradients that are here. Not written.
        order: p of the p-norm, positive or infinity.
        norm_ranks: The ranks. All of them call this, and ask for the same.
        count: k, how many norms there are.
        device: Where the norms are wanted.
        engine: Which engine measures.
        parts: To be told the sums of all parameters: where the gradients are among these, and how
            many there are.
        weights: To be told the norms of the parameters: these, where they have gradients here.
        present: To be told which norms have a gradient: those that have one here.
    """
    entered = {*norm_ranks.groups}

    def counted_buckets(group: RankGroup | None, some: Sequence[Bucket]) -> list[Bucket]:
        own = [b for b in some if (b.group if b.group in entered else None) == group]
        return [bucket for bucket in own if bucket.counts]

    def measured_vectors(group: RankGroup | None) -> Tensor:
        own = counted_buckets(group, buckets)
        sums = [bucket.power_sums(engine, order) for bucket in own]
        vectors = [_total(sums, own, order, count, device)]
        if parts is not None:
            vectors.append(_by_parameter(sums, own, order, *parts, device))
        if weights is not None:
            own = counted_buckets(group, weights)
            sums = [bucket.power_sums(engine, order) for bucket in own]
            vectors.append(_total(sums, own, order, count, device))
        if present is not None:
            vectors.append(present.to(vectors[0].dtype))
        return torch.cat(vectors) if len(vectors) > 1 else vectors[0]

    alone = any(bucket.group not in entered for bucket in buckets)
    together = norm_ranks.combined(measured_vectors, order, alone=alone)
    lengths = [count] if parts is None else [count, parts[1]]
    lengths += [count for asked in (weights, present) if asked is not None]
    found = iter(torch.split(together, lengths) if len(lengths) > 1 else [together])
    return SharedNorms(
        _norms(next(found), order),
        None if parts is None else next(found),
        None if weights is None else _norms(next(found), order),
        None if present is None else next(found) > 0,
    )


def _norms(power_sums: Tensor, order: float) -> Tensor:
    return power_sums if order == INFINITY else root(power_sums, order)


def _by_parameter(
    sums: Sequence[Tensor],
    buckets: Sequence[Bucket],
    order: float,
    norm_indices: tuple[NormIndices, ...],
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the power sums of the gradients of all parameters, shape (count,)."""
    if not buckets:
        return torch.zeros(count, dtype=norm_dtype(device), device=device)
    found = _together(list(map(partial(_of_gradients, order), sums, buckets)), device)
    indices = [index for bucket in buckets for index in bucket.indices or range(len(norm_indices))]
    return sums_by_norm(found, order, tuple(norm_indices[index] for index in indices), count)


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
    if buckets[0].norm_indices:
        norm_indices = tuple(indices for bucket in buckets for indices in bucket.norm_indices)
        return sums_by_norm(together, order, norm_indices, count)
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
    norm_indices = tuple(bucket.norm_indices)
    return sums_by_norm(sums, order, gradient_indices(norm_indices), len(norm_indices))


def _together(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Bring what was measured on several devices to one."""
    if len(values) == 1 and values[0].device == device:
        return values[0]
    return torch.cat([value.to(device, norm_dtype(device)) for value in values])
