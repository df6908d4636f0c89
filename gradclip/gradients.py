"""From what optimizers hold to buckets of gradients that one engine call can take, each once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .engines import engine_for, norm_dtype
from .engines.base import Batch
from .engines.layout import rows_share_memory
from .errors import GradientError
from .ranks.groups import Group
from .ranks.shards import (
    LOCAL,
    Share,
    common_share_of,
    is_pending,
    is_spread,
    local_of,
    share_of,
    stored,
)
from .scopes.norm_indices import Place, spread

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)

HERE = None, True
"""The group of a gradient that is on no other rank, and that it counts."""

# One call into C for all tensors costs less than a line of Python for each.
_ORDINARY = {Tensor}
_PARAMETERS = itemgetter("params")
_GRADIENT = attrgetter("grad")
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
    places: list[Place] = field(default_factory=list)
    """Where the norms of what is measured are; empty where all share one."""
    written_places: list[Place] = field(default_factory=list)
    """The same of what is written."""
    rows: bool = False
    """Whether the indices of dimension 0 have norms of their own."""
    group: Group | None = None
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
        return spread(values, tuple(self.written_places), otherwise) if self.places else values


def parameters_of(groups: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Return every parameter of an optimizer's parameter groups, in order."""
    return chain.from_iterable(map(_PARAMETERS, groups))


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that are there, each object once however many parameters share it."""
    found = [*map(_GRADIENT, parameters)]
    if {*map(type, found)} != _ORDINARY:
        found = [gradient for gradient in found if gradient is not None]
    return distinct(found)


def gradients_held(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of an optimizer's parameters, each object once."""
    return gradients_of(parameters_of(optimizer.param_groups))


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, each object once, in the order in which they come first."""
    if len({*map(id, tensors)}) == len(tensors):
        return tensors
    return list({id(tensor): tensor for tensor in tensors}.values())


def buckets_of(
    gradients: Sequence[Tensor],
    order: float,
    places: Iterable[Place] | None = None,
    counted: Sequence[bool] = (),
) -> list[Bucket]:
    """Sort gradients into buckets.

    Args:
        gradients: Distinct gradients of any mixture of devices, dtypes and layouts. Not written.
        order: p of the norm to be measured.
        places: For each gradient where its norms are; None where all share one.
        counted: For each whether it counts here, not as a copy on another rank; empty for all.

    Raises:
        GradientError: A dtype or layout that cannot be clipped rightly, or rows that share memory.
    """
    if places is None and not counted:
        bucket = _bucket_of_all(gradients)
        if bucket is not None:
            return [bucket]
    buckets: dict[tuple[Any, ...], Bucket] = {}
    strided, given = torch.strided, repeat(None) if places is None else places
    for index, (gradient, place) in enumerate(zip(gradients, given, strict=False)):
        share = None
        if type(gradient) is Tensor and gradient.dtype in REAL and gradient.layout is strided:
            measured = written = gradient
        else:
            measured, written = _forms_of(gradient, order)
            share = share_of(gradient) if is_spread(gradient) else None
        rows = place is not None and place.rows
        group, counts = HERE if share is None else (share.group, share.counts)
        counts = counts and (not counted or counted[index])
        key = (gradient.device, gradient.dtype, rows, group, counts)
        bucket = buckets.get(key)
        if bucket is None:
            device = written.device
            bucket = buckets[key] = Bucket(device, Batch(), Batch(), [], [], rows, group, counts)
        bucket.indices.append(index)
        bucket.measured.append(measured)
        bucket.written.append(written)
        if place is not None:
            _add_place(bucket, gradient, place, share)
    for bucket in buckets.values():
        if all(map(is_, bucket.measured, bucket.written)):
            bucket.written = bucket.measured
    return list(buckets.values())


def _bucket_of_all(gradients: Sequence[Tensor]) -> Bucket | None:
    """Return the bucket that takes all: the usual case, told by two passes in C."""
    types, (group, counts) = {*map(type, gradients)}, HERE
    if len(types) == 1 and is_spread(gradients[0]):
        share = common_share_of(gradients)  # type: ignore[arg-type]
        if share is None:
            return None
        group, counts, gradients = share.group, share.counts, [*map(LOCAL, gradients)]
        types = {*map(type, gradients)}
    if types != _ORDINARY:
        return None
    facts = {*map(_FACTS, gradients)}
    dtype, device, layout = next(iter(facts))
    if len(facts) > 1 or dtype not in REAL or layout is not torch.strided:
        return None
    listed = Batch(gradients)
    return Bucket(device, listed, listed, group=group, counts=counts)


def refuse_unordered(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients whose elements cannot be bounded one by one.

    Raises:
        GradientError: A complex gradient, or a sum over ranks that is pending.
    """
    for gradient in gradients:
        if gradient.is_complex():
            raise GradientError(
                f"Found a gradient of dtype {gradient.dtype} and max_value: complex elements "
                "cannot be bounded one by one. Leave max_value at None."
            )
        if is_spread(gradient) and is_pending(gradient):
            raise GradientError(
                f"Found a gradient with placements {tuple(gradient.placements)} and max_value: "
                "elements that are still to be added up over ranks cannot be bounded. Leave "
                "max_value at None, or redistribute() it to Replicate first."
            )


def coalesce_(gradients: Iterable[Tensor]) -> bool:
    """Sum the duplicates of sparse gradients in place: what an element is must be known first.

    Returns:
        Whether there were any; buckets made before then hold what is no longer the gradient.
    """
    uncoalesced = [g for g in gradients if g.is_sparse and not g.is_coalesced()]
    for gradient in uncoalesced:
        gradient.copy_(gradient.coalesce())
    return bool(uncoalesced)


def copied(buckets: Iterable[Bucket]) -> list[Bucket]:
    """Return buckets of what is measured, in memory of its own."""
    return [
        replace(bucket, measured=copies, written=copies, written_places=bucket.places)
        for bucket in buckets
        for copies in [[tensor.clone() for tensor in bucket.measured]]
    ]


def _add_place(bucket: Bucket, gradient: Tensor, place: Place, share: Share | None) -> None:
    measured = written = place
    if place.rows and len(place.labels) != gradient.shape[0]:
        raise GradientError(
            f"Found a gradient of shape {tuple(gradient.shape)}, whose parameter had "
            f"{len(place.labels)} indices of dimension 0 when they were labelled: detach() and "
            "attach a new clipper after parameters were resized."
        )
    if place.rows and gradient.is_sparse:
        # What is measured and written holds the values alone.
        measured = _place_of_values(place, gradient.coalesce().indices())
        written = _place_of_values(place, gradient._indices())
    elif place.rows and share is not None:
        measured = written = _place_of_share(place, share)
    elif place.rows and rows_share_memory(gradient):
        raise GradientError(
            f"Found a tensor of shape {tuple(gradient.shape)} and strides {gradient.stride()}, "
            "in which indices of dimension 0 share memory and cannot be scaled apart: make it "
            "contiguous(), or give its parameter one norm."
        )
    bucket.places.append(measured)
    bucket.written_places.append(written)


@lru_cache(maxsize=1 << 12)
def _place_of_share(place: Place, share: Share) -> Place:
    """Return where the norms of the rows are that are here."""
    if share.rows is None:
        return place
    return Place(place.labels.cpu()[share.rows], rows=True)


def _place_of_values(place: Place, indices: Tensor) -> Place:
    return Place(place.labels.to(indices.device)[indices[0]], rows=True)


def _forms_of(gradient: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the real strided tensor to measure and the strided tensor to write."""
    _refuse_unfit(gradient)
    measured = written = gradient
    if is_spread(gradient):
        measured, written = local_of(gradient), stored(gradient)
    if gradient.layout is torch.sparse_coo:
        measured, written = gradient.coalesce()._values(), gradient._values()
    if written.is_complex():
        measured = _as_real(measured) if order == 2 else _moduli(measured)
        written = _as_real(written)
    return measured, written


def _moduli(tensor: Tensor) -> Tensor:
    """Return absolute values, in float64: in the gradient's own precision they could overflow."""
    if norm_dtype(tensor.device) is torch.float64:
        tensor = tensor.to(torch.complex128)
    return tensor.abs()


def _as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor, or the conjugate that it is a lazy conjugate of, as real numbers."""
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _refuse_unfit(gradient: Tensor) -> None:
    if not isinstance(gradient, Tensor):
        raise GradientError(
            f"Found a {type(gradient).__name__} among the gradients: give tensors only."
        )
    what = f"a gradient of dtype {gradient.dtype} and shape {tuple(gradient.shape)}"
    if gradient.dtype not in REAL + COMPLEX:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in REAL + COMPLEX)
        raise GradientError(
            f"Found {what}: gradients must have one of the dtypes {names}. "
            "Convert it, or leave its parameter out."
        )
    if gradient.layout not in (torch.strided, torch.sparse_coo):
        raise GradientError(
            f"Found {what} in layout {gradient.layout}: the layouts that can be clipped in place "
            "are torch.strided and torch.sparse_coo. Convert it with to_dense() or to_sparse()."
        )
