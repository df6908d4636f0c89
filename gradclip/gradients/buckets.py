"""From what optimizers hold to buckets of gradients that one engine call can take, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from ..engines import engine_for
from ..engines.base import Batch
from ..engines.layout import rows_share_memory
from ..errors import GradientError
from ..ranks.groups import RankGroup
from ..ranks.shards import LOCAL, Shard, common_shard_of, is_dtensor, shard_of
from ..scopes.norm_indices import NormIndices, row_values
from .forms import REAL, forms_of
from .held import PLAIN

HERE = None, True
"""The group of a gradient that is on no other rank, and that it counts."""

_FACTS = attrgetter("dtype", "device", "layout")


@dataclass(slots=True)
class Bucket:
    """Gradients of one device and dtype, all with or without rows, in the order they were met.

    ``measured`` and ``written`` differ only where a gradient has duplicates (an uncoalesced
    sparse one is measured coalesced) or is complex (measured as real numbers): scaling what
    is written scales what was measured.
    """

    device: torch.device
    measured: list[Tensor]
    written: list[Tensor]
    norm_indices: list[NormIndices] = field(default_factory=list)
    """Where the norms of what is measured are; empty where all share one."""
    written_norm_indices: list[NormIndices] = field(default_factory=list)
    """The same of what is written."""
    rows: bool = False
    """Whether the indices of dimension 0 have norms of their own."""
    group: RankGroup | None = None
    """The ranks that the gradients are spread over."""
    counts: bool = True
    """Whether their sums are counted here: of copies on several ranks one is."""
    indices: list[int] = field(default_factory=list)
    """Which of the gradients that were sorted these are; empty for all of them."""

    def power_sums(self, engine: str, order: float) -> Tensor:
        """Measure each gradient, or each of its rows; see `Engine.power_sums`."""
        return engine_for(engine, self.device).power_sums(self.measured, order, rows=self.rows)

    def scale_(self, engine: str, coefficients: Tensor) -> None:
        """Multiply each gradient by the coefficient of its norm, in place; shape (k,)."""
        values = self._spread(coefficients, 1.0)
        engine_for(engine, self.device).scale_(self.written, values, rows=self.rows)

    def clamp_(self, engine: str, bounds: Tensor) -> None:
        """Limit the elements of each gradient to the bound of its norm, in place; shape (k,)."""
        values = self._spread(bounds, math.inf)
        engine_for(engine, self.device).clamp_(self.written, values, rows=self.rows)

    def _spread(self, values: Tensor, otherwise: float) -> Tensor:
        if values.device != self.device:
            values = values.to(self.device)
        return (
            row_values(values, tuple(self.written_norm_indices), otherwise)
            if self.norm_indices
            else values
        )


def buckets_of(
    gradients: Sequence[Tensor],
    order: float,
    norm_indices: Iterable[NormIndices] | None = None,
    counts_here: Sequence[bool] = (),
) -> list[Bucket]:
    """Sort gradients into buckets.

    Args:
        gradients: Distinct gradients of any mixture of devices, dtypes and layouts. Not written.
        order: p of the norm to be measured.
        norm_indices: For each gradient where its norms are; None where all share one.
        counts_here: For each whether it counts here, not as a copy on another rank; empty for all.

    Raises:
        GradientError: A dtype or layout that cannot be clipped rightly, or rows that share memory.
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
            bucket = buckets[key] = Bucket(device, Batch(), Batch(), [], [], rows, group, counts)
        bucket.indices.append(index)
        bucket.measured.append(measured)
        bucket.written.append(written)
        if indices is not None:
            _add_norm_indices(bucket, gradient, indices, shard)
    for bucket in buckets.values():
        if all(map(is_, bucket.measured, bucket.written)):
            bucket.written = bucket.measured
    return list(buckets.values())


def _bucket_of_all(gradients: Sequence[Tensor]) -> Bucket | None:
    """Return the bucket that takes all: the usual case, told by two passes in C."""
    types, (group, counts) = {*map(type, gradients)}, HERE
    if len(types) == 1 and is_dtensor(gradients[0]):
        shard = common_shard_of(gradients)  # type: ignore[arg-type]
        if shard is None:
            return None
        group, counts, gradients = shard.group, shard.counts, [*map(LOCAL, gradients)]
        types = {*map(type, gradients)}
    if types != PLAIN:
        return None
    facts = {*map(_FACTS, gradients)}
    dtype, device, layout = next(iter(facts))
    if len(facts) > 1 or dtype not in REAL or layout is not torch.strided:
        return None
    listed = Batch(gradients)
    return Bucket(device, listed, listed, group=group, counts=counts)


def copies_of(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return buckets of what is measured, in memory of its own."""
    return [
        replace(bucket, measured=copies, written=copies, written_norm_indices=bucket.norm_indices)
        for bucket in buckets
        for copies in [[tensor.clone() for tensor in bucket.measured]]
    ]


def _add_norm_indices(
    bucket: Bucket, gradient: Tensor, norm_indices: NormIndices, shard: Shard | None
) -> None:
    measured = written = norm_indices
    if norm_indices.rows and len(norm_indices.indices) != gradient.shape[0]:
        raise GradientError(
            f"Found a gradient of shape {tuple(gradient.shape)}, whose parameter had "
            f"{len(norm_indices.indices)} indices of dimension 0 when they were labelled: detach() "
            "and attach a new clipper after parameters were resized."
        )
    if norm_indices.rows and gradient.is_sparse:
        # What is measured and written holds the values alone.
        measured = _indices_of_values(norm_indices, gradient.coalesce().indices())
        written = _indices_of_values(norm_indices, gradient._indices())
    elif norm_indices.rows and shard is not None:
        measured = written = _indices_of_shard(norm_indices, shard)
    elif norm_indices.rows and rows_share_memory(gradient):
        raise GradientError(
            f"Found a tensor of shape {tuple(gradient.shape)} and strides {gradient.stride()}, "
            "in which indices of dimension 0 share memory and cannot be scaled apart: make it "
            "contiguous(), or give its parameter one norm."
        )
    bucket.norm_indices.append(measured)
    bucket.written_norm_indices.append(written)


@lru_cache(maxsize=1 << 12)
def _indices_of_shard(norm_indices: NormIndices, shard: Shard) -> NormIndices:
    """Return where the norms of the rows are that are here."""
    if shard.rows is None:
        return norm_indices
    return NormIndices(norm_indices.indices.cpu()[shard.rows], rows=True)


def _indices_of_values(norm_indices: NormIndices, positions: Tensor) -> NormIndices:
    return NormIndices(norm_indices.indices.to(positions.device)[positions[0]], rows=True)
