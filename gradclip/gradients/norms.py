"""Measures the norms of buckets of gradients, on one rank or across ranks.

Engines measure power sums ``sum |g|^p``, one for each gradient or row. Power sums of the gradients
that share a norm are added, then those of all ranks; the root is taken last.
For p = inf the largest element stands for the power sum, and the maximum for the sum.
"""

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
from ..ranks.shared_loss import loss_numbers, numbers_per_loss
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
    gradient_sums: list[Tensor] | None = None,
    groups: Sequence[RankGroup] = (),
) -> Tensor:
    """Measure the norms of buckets of gradients.

    No host sync, unless gradients lie on several devices: their sums are copied to one. Collective
    if a bucket or ``groups`` names a rank group.

    Args:
        buckets: The gradients with their norm indices. Not written.
        order: p of the p-norm, positive or infinity.
        count: k, the number of norms; 1 if the gradients have no norm indices.
        device: The device of the result; by default that of the first gradient, or the CPU.
        engine: The name of the engine.
        scalar: True to return a single norm 0-d.
        gradient_sums: A list to which the power sums of all gradients are appended, one vector for
            each bucket, in memory of their own. The norms have the same bits with and without it.
        groups: Rank groups whose collective this rank enters even if it has none of their
            gradients. The groups of the buckets need not be among them.

    Returns:
        Shape (k,), or () for a scalar, float64 (float32 if the device has no float64). 0 for a
        norm without gradients, NaN or infinity if its gradients are not finite.
    """
    spread = {bucket.group for bucket in buckets if bucket.group is not None}.union(groups)
    if spread:
        device = device or (buckets[0].device if buckets else torch.device("cpu"))
        norm_ranks = norm_ranks_of(spread)
        norms = measure_across_ranks(
            buckets, order, norm_ranks, count=count, device=device, engine=engine
        ).norms
        return norms.squeeze(0) if scalar else norms
    single = (
        len(buckets) == 1 and not buckets[0].norm_indices and device in (None, buckets[0].device)
    )
    if single and gradient_sums is None:
        # The usual case: one engine call returns the norm, without a vector of sums between.
        serving = engine_for(engine, buckets[0].device)
        return serving.norm(buckets[0].measured, order, scalar=scalar)
    if device is None:
        device = buckets[0].device if buckets else torch.device("cpu")
    if not buckets:
        shape = () if scalar else (count,)
        return torch.zeros(shape, dtype=norm_dtype(device), device=device)
    if not buckets[0].norm_indices:
        norms_of_buckets = [_norm(bucket, order, engine, gradient_sums) for bucket in buckets]
        if single:
            return norms_of_buckets[0].squeeze(0) if scalar else norms_of_buckets[0]
        # The p-norm of the norms of disjoint parts is the p-norm of the whole.
        together = _together(norms_of_buckets, device)
        norm: Tensor = torch.linalg.vector_norm(together, order, 0, keepdim=not scalar)
        return norm
    sums = [bucket.power_sums(engine, order) for bucket in buckets]
    if gradient_sums is not None:
        gradient_sums += map(partial(_sums_of_gradients, order), sums, buckets)
    return _roots(_sums_of_norms(sums, buckets, order, count, device), order)


@dataclass(frozen=True, slots=True)
class SharedNorms:
    """Results of a measurement across ranks, the same bits on every rank."""

    norms: Tensor
    """Shape (k,)."""
    parameter_sums: Tensor | None = None
    """Power sums of the gradients of all parameters, one for each parameter."""
    weight_norms: Tensor | None = None
    """Norms of the parameters, shape (k,)."""
    present: Tensor | None = None
    """Shape (k,), bool: True for a norm with a gradient on any rank."""
    loss: Tensor | None = None
    """The losses of the ranks, as `sum_and_count` and `host_mean_loss` read them."""


def measure_across_ranks(
    buckets: Sequence[Bucket],
    order: float,
    norm_ranks: NormRanks,
    *,
    count: int,
    device: torch.device,
    engine: str,
    parameters: tuple[tuple[NormIndices, ...], int] | None = None,
    weights: Sequence[Bucket] | None = None,
    present: Tensor | None = None,
    shares_loss: bool = False,
    loss: float | Tensor | None = None,
) -> SharedNorms:
    """Measure norms that span several ranks, with one collective for each rank group.

    All ranks call this with the same optional arguments: everything travels in one vector.

    Args:
        buckets: The gradients of this rank. Not written.
        order: p of the p-norm, positive or infinity.
        norm_ranks: The ranks that the norms span.
        count: k, the number of norms.
        device: The device of the results.
        engine: The name of the engine.
        parameters: To measure the power sum of each parameter's gradient as well: the indices of
            this rank's gradients among the parameters of all ranks, and the number of these.
        weights: To measure the norms of the parameters as well: those of this rank.
        present: To learn which norms have a gradient: True for those with one on this rank.
        shares_loss: To add up the losses of the ranks.
        loss: That of this rank; None if it has none.
    """
    entered = {*norm_ranks.groups}

    def counted(group: RankGroup | None, candidates: Sequence[Bucket]) -> list[Bucket]:
        """Return the buckets of a rank group that this rank counts; None for all other buckets."""
        return [
            bucket
            for bucket in candidates
            if bucket.counts and (bucket.group if bucket.group in entered else None) == group
        ]

    def local_vector(group: RankGroup | None) -> Tensor:
        """Return what this rank contributes to the collective of a rank group, in fresh memory."""
        gradients = counted(group, buckets)
        sums = [bucket.power_sums(engine, order) for bucket in gradients]
        vectors = [_sums_of_norms(sums, gradients, order, count, device)]
        if parameters is not None:
            vectors.append(_sums_of_parameters(sums, gradients, order, *parameters, device))
        if weights is not None:
            parameters_here = counted(group, weights)
            sums = [bucket.power_sums(engine, order) for bucket in parameters_here]
            vectors.append(_sums_of_norms(sums, parameters_here, order, count, device))
        if present is not None:
            # As numbers: neither their sum nor their maximum is 0 if one rank has a gradient.
            vectors.append(present.to(vectors[0].dtype))
        if shares_loss:
            # Once, as the sums of all collectives are added up.
            own = loss if group is norm_ranks.widest else None
            vectors.append(loss_numbers(own, order, device))
        return torch.cat(vectors) if len(vectors) > 1 else vectors[0]

    # Gradients outside of the rank groups add to the norms without a collective of their own.
    alone = any(bucket.group not in entered for bucket in buckets)
    vector = norm_ranks.combined(local_vector, order, alone=alone)
    lengths = [count] if parameters is None else [count, parameters[1]]
    lengths += [count for option in (weights, present) if option is not None]
    if shares_loss:
        lengths.append(numbers_per_loss(order))
    results = iter(torch.split(vector, lengths) if len(lengths) > 1 else [vector])
    return SharedNorms(
        _roots(next(results), order),
        None if parameters is None else next(results),
        None if weights is None else _roots(next(results), order),
        None if present is None else next(results) > 0,
        next(results) if shares_loss else None,
    )


def _roots(power_sums: Tensor, order: float) -> Tensor:
    return power_sums if order == INFINITY else root(power_sums, order)


def _sums_of_norms(
    sums: Sequence[Tensor],
    buckets: Sequence[Bucket],
    order: float,
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the power sum of each norm, shape (k,), from those of gradients or rows."""
    if not buckets:
        return torch.zeros(count, dtype=norm_dtype(device), device=device)
    together = _together(sums, device)
    if buckets[0].norm_indices:
        norm_indices = tuple(indices for bucket in buckets for indices in bucket.norm_indices)
        return sums_by_norm(together, order, norm_indices, count)
    return together.amax(0, keepdim=True) if order == INFINITY else together.sum(0, keepdim=True)


def _sums_of_parameters(
    sums: Sequence[Tensor],
    buckets: Sequence[Bucket],
    order: float,
    parameter_indices: tuple[NormIndices, ...],
    count: int,
    device: torch.device,
) -> Tensor:
    """Return the power sum of each parameter's gradient, shape (count,)."""
    if not buckets:
        return torch.zeros(count, dtype=norm_dtype(device), device=device)
    gradient_sums = _together(list(map(partial(_sums_of_gradients, order), sums, buckets)), device)
    every = range(len(parameter_indices))
    positions = [position for bucket in buckets for position in bucket.indices or every]
    indices = tuple(parameter_indices[position] for position in positions)
    return sums_by_norm(gradient_sums, order, indices, count)


def _norm(bucket: Bucket, order: float, engine: str, gradient_sums: list[Tensor] | None) -> Tensor:
    serving = engine_for(engine, bucket.device)
    if gradient_sums is None:
        return serving.norm(bucket.measured, order)
    norm, sums = serving.norm_and_sums(bucket.measured, order)
    gradient_sums.append(sums)
    return norm


def _sums_of_gradients(order: float, sums: Tensor, bucket: Bucket) -> Tensor:
    """Return one power sum for each gradient, from those of gradients or of their rows.

    Rows that belong to no norm do not count.
    """
    if capturing():
        return sums  # a captured graph records no norms of parameters
    sums = sums.clone()  # the root of the norms may be taken in place
    if not bucket.rows:
        return sums
    norm_indices = tuple(bucket.norm_indices)
    return sums_by_norm(sums, order, gradient_indices(norm_indices), len(norm_indices))


def _together(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenate vectors of several devices on one device."""
    if len(values) == 1 and values[0].device == device:
        return values[0]
    return torch.cat([value.to(device, norm_dtype(device)) for value in values])
