"""Buckets: gradients grouped by device and dtype, so that one engine call takes many.

An engine call takes tensors of one device and dtype. Sorting by Python costs microseconds for each
gradient, which the usual case, all gradients in one bucket, avoids.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..engines import engine_for
from ..engines.base import REAL, TensorList, are_alike
from ..engines.layout import rows_overlap
from ..errors import GradientError
from ..ranks.groups import RankGroup
from ..ranks.shards import LOCAL, Shard, common_shard_of, is_dtensor, shard_of
from ..scopes.norm_indices import NormIndices, row_values
from .forms import forms_of
from .held import PLAIN

HERE = None, True
"""Rank group of a gradient that is on no other rank, and that this rank counts it."""


@dataclass(slots=True)
class Bucket:
    """Gradients of one device and dtype, all with or all without norms for their rows.

    ``measured`` and ``written`` differ only if a gradient is an uncoalesced sparse tensor, which is
    measured coalesced, or complex, which is measured as real numbers. Scaling the written tensor
    scales the norm of the measured one.
    """

    device: torch.device
    measured: TensorList
    written: TensorList
    norm_indices: list[NormIndices] = field(default_factory=list)
    """The norm indices of each measured tensor; empty if all share one norm."""
    written_norm_indices: list[NormIndices] = field(default_factory=list)
    """The norm indices of each written tensor."""
    rows: bool = False
    """True if every index of dimension 0 has a norm of its own."""
    group: RankGroup | None = None
    """The ranks over which the gradients are sharded or copied; None for this rank alone."""
    counts: bool = True
    """True if this rank counts the gradients, False if another rank counts their copies."""
    indices: list[int] = field(default_factory=list)
    """Positions of these gradients in the input; empty if the bucket holds all of them."""

    def power_sums(self, engine: str, order: float) -> Tensor:
        """Measure the power sum of each gradient, or of each row; see `Engine.power_sums`."""
        return engine_for(engine, self.device).power_sums(self.measured, order, rows=self.rows)

    def scale_(self, engine: str, coefficients: Tensor) -> None:
        """Multiply each gradient by the coefficient of its norm, in place; shape (k,)."""
        values = self._values(coefficients, 1.0)
        engine_for(engine, self.device).scale_places_(self.written, values, rows=self.rows)

    def clamp_(self, engine: str, bounds: Tensor) -> None:
        """Bound the elements of each gradient in place; shape (k,), a bound for each norm."""
        values = self._values(bounds, math.inf)
        engine_for(engine, self.device).clamp_(self.written, values, rows=self.rows)

    def _values(self, values: Tensor, otherwise: float) -> Tensor:
        """Return the value of each gradient or row; ``otherwise`` for rows without a norm."""
        if values.device != self.device:
            values = values.to(self.device)
        if not self.norm_indices:
            return values
        return row_values(values, tuple(self.written_norm_indices), otherwise)


def buckets_of(
    gradients: Sequence[Tensor],
    order: float,
    norm_indices: Iterable[NormIndices] | None = None,
    counts_here: Sequence[bool] = (),
) -> list[Bucket]:
    """Sort gradients into buckets, in the order of their first gradients.

    Args:
        gradients: Distinct gradients of any mixture of devices, dtypes and layouts. Not written.
        order: p of the norm that will be measured.
        norm_indices: The norm indices of each gradient; None if all share one norm.
        counts_here: For each gradient, True if this rank counts it, False if another rank counts
            its copy; empty if this rank counts all.

    Raises:
        GradientError: A dtype or layout that cannot be clipped rightly, rows that share memory, or
            a gradient with another number of rows than norm indices.
    """
    if norm_indices is None and not counts_here:
        bucket = _bucket_of_all(gradients)
        if bucket is not None:
            return [bucket]
    buckets: dict[tuple[Any, ...], Bucket] = {}
    strided, given = torch.strided, repeat(None) if norm_indices is None else norm_indices
    for index, (gradient, indices) in enumerate(zip(gradients, given, strict=False)):
        shard = None
        if type(gradient) is Tensor and gradient.dtype in REAL and gradient.layout is strided:
            measured = written = gradient
        else:
            measured, written = forms_of(gradient, order)
            shard = shard_of(gradient) if is_dtensor(gradient) else None
        rows = indices is not None and indices.rows
        group, counts = HERE if shard is None else (shard.group, shard.counts)
        counts = counts and (not counts_here or counts_here[index])
        key = (gradient.device, gradient.dtype, rows, group, counts)
        bucket = buckets.get(key)
        if bucket is None:
            device = written.device
            bucket = buckets[key] = Bucket(
                device, TensorList(), TensorList(), [], [], rows, group, counts
            )
        bucket.indices.append(index)
        bucket.measured.append(measured)
        bucket.written.append(written)
        if indices is not None:
            _add_norm_indices(bucket, gradient, indices, shard)
    for bucket in buckets.values():
        # One list for both: an engine looks up the addresses of a Batch once.
        if all(map(is_, bucket.measured, bucket.written)):
            bucket.written = bucket.measured
    return list(buckets.values())


def _bucket_of_all(gradients: Sequence[Tensor]) -> Bucket | None:
    """Return the one bucket of plain gradients of one device and dtype; None for any mixture.

    Two passes in C, over types and over facts, instead of a line of Python for each gradient.
    """
    types, (group, counts) = {*map(type, gradients)}, HERE
    if len(types) == 1 and is_dtensor(gradients[0]):
        shard = common_shard_of(gradients)  # type: ignore[arg-type]
        if shard is None:
            return None
        group, counts, gradients = shard.group, shard.counts, [*map(LOCAL, gradients)]
        types = {*map(type, gradients)}
    if types != PLAIN or not are_alike(gradients):
        return None
    batch = TensorList(gradients)
    return Bucket(gradients[0].device, batch, batch, group=group, counts=counts)


def copies_of(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return buckets of copies of the measured tensors, which can be written freely."""
    return [
        replace(bucket, measured=copies, written=copies, written_norm_indices=bucket.norm_indices)
        for bucket in buckets
        for copies in [TensorList(tensor.clone() for tensor in bucket.measured)]
    ]


def _add_norm_indices(
    bucket: Bucket, gradient: Tensor, norm_indices: NormIndices, shard: Shard | None
) -> None:
    measured = written = norm_indices
    if norm_indices.rows and len(norm_indices.indices) != gradient.shape[0]:
        raise GradientError(
            f"Found a gradient of shape {tuple(gradient.shape)}, whose parameter had "
            f"{len(norm_indices.indices)} rows when it was labelled: detach() the clipper and "
            "attach a new one after a parameter was resized."
        )
    if norm_indices.rows and gradient.is_sparse:
        # The tensors of a sparse gradient hold the rows of its entries alone.
        measured = _indices_of_values(norm_indices, gradient.coalesce().indices())
        written = _indices_of_values(norm_indices, gradient._indices())
    elif norm_indices.rows and shard is not None:
        measured = written = _indices_of_shard(norm_indices, shard)
    elif norm_indices.rows and rows_overlap(gradient):
        raise GradientError(
            f"Found a tensor of shape {tuple(gradient.shape)} and strides {gradient.stride()}, "
            "in which rows share memory and cannot be scaled apart: make it contiguous(), or "
            "give its parameter one norm."
        )
    bucket.norm_indices.append(measured)
    bucket.written_norm_indices.append(written)


@lru_cache(maxsize=1 << 12)
def _indices_of_shard(norm_indices: NormIndices, shard: Shard) -> NormIndices:
    """Return the norm indices of the rows that are on this rank."""
    if shard.rows is None:
        return norm_indices
    return NormIndices(norm_indices.indices.cpu()[shard.rows], rows=True)


def _indices_of_values(norm_indices: NormIndices, positions: Tensor) -> NormIndices:
    """Return the norm indices of the entries of a sparse gradient, whose rows are given."""
    return NormIndices(norm_indices.indices.to(positions.device)[positions[0]], rows=True)
