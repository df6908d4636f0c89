"""The engine of Triton kernels for CUDA: one launch measures, one scales what is too large.

Rows whose largest norms follow from their weights are measured and scaled in one launch.

The kernels know addresses and lengths only. Torch operators do the rest: tensors without an
address, writes to tensors with gaps between their elements, and narrow rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..base import Engine, RelativeLimit, TensorList, are_alike, rounded_bounds
from ..layout import (
    PLAIN_TYPES,
    as_stored,
    flat,
    flat_view,
    is_narrow,
    table,
    wide_table_view,
)
from ..operators.engine import OPERATORS
from . import launching
from .launching import launch
from .plan import BLOCK
from .requests import Request, Requests


class TritonEngine(Engine):
    """Measures with one read and writes only what changes, without the host knowing which.

    Args:
        block: Elements that a program takes at a time.
    """

    name = "triton"

    def __init__(self, block: int = BLOCK) -> None:
        self._requests = Requests(block, self.check_supported)

    def unsupported(self, device: torch.device) -> str | None:
        """See `Engine.unsupported`."""
        return launching.unsupported(device)

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        if rows and any(map(is_narrow, tensors)):
            return self._power_sums_of_rows(tensors, order)
        request = self._requests.of(tensors, rows, table if rows else flat)
        if request is None:
            return OPERATORS.power_sums(tensors, order, rows=rows)
        sums = request.new(len(request.plan.pieces))
        self._measure(request, order, sums=sums)
        return _strip_sums(request, sums, order)

    def _power_sums_of_rows(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """Measure rows of which some are narrow, and put the sums in the order of the tensors."""
        narrow = [*map(is_narrow, tensors)]
        sums = {}
        for engine, flag in ((OPERATORS, True), (self, False)):
            chosen = [*compress(tensors, [is_so is flag for is_so in narrow])]
            if chosen:
                row_sums = engine.power_sums(chosen, order, rows=True)
                sums[flag] = iter(row_sums.split([*map(len, chosen)]))
        return torch.cat([next(sums[flag]) for flag in narrow])

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        request = self._requests.of(tensors, False, flat)
        if request is None:
            return OPERATORS.norm(tensors, order, scalar=scalar)
        norm = request.new() if scalar else request.new(1)
        self._measure(request, order, norm=norm)
        return norm

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """See `Engine.norm_and_sums`."""
        request = self._requests.of(tensors, False, flat)
        if request is None:
            return OPERATORS.norm_and_sums(tensors, order)
        norm, sums = request.new(1), request.new(len(request.plan.pieces))
        self._measure(request, order, sums=sums, norm=norm)
        return norm, _strip_sums(request, sums, order)

    def scale_places_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_places_`. What was measured is known to share nothing, or to share."""
        note = tensors.note if isinstance(tensors, TensorList) and not rows else None
        if isinstance(note, Request) and note.is_apart:
            self.scale_(tensors, coefficients)
        else:
            super().scale_places_(tensors, coefficients, rows=rows)

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`. The version of every tensor rises, also if nothing is written."""
        self._change(OPERATORS.scale_, tensors, coefficients, rows, limit=False)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`. The version of every tensor rises, also if nothing is written."""
        bounds = rounded_bounds(bounds, tensors[0].dtype)
        self._change(OPERATORS.clamp_, tensors, bounds, rows, limit=True)

    def prepare_rows(
        self, gradients: TensorList, weights: TensorList, order: float, *, rows: bool
    ) -> int:
        """See `Engine.prepare_rows`. Nor are narrow rows, or rows longer than a piece, accepted."""
        located = [self._located(tensors, rows) for tensors in (gradients, weights)]
        request, weight_request = located
        if (
            request is None
            or weight_request is None
            or request.device != weight_request.device
            or request.plan is not weight_request.plan
            or not request.plan.whole
        ):
            return 0
        gradients.note, weights.note = located
        return request.plan.strips

    def _located(self, tensors: TensorList, rows: bool) -> Request | None:
        """Return the request for the rows of plain tensors; None for others."""
        if not PLAIN_TYPES.issuperset(map(type, tensors)) or not are_alike(tensors):
            return None
        request = self._requests.of(tensors, True, _wide_rows if rows else _one_row, divide=False)
        return request if request is not None and request.is_apart else None

    def clip_rows_(
        self,
        gradients: TensorList,
        weights: TensorList,
        order: float,
        limit: RelativeLimit,
        *,
        erase: bool,
        write: bool,
    ) -> Tensor:
        """See `Engine.clip_rows_`."""
        requests: Any = gradients.note, weights.note
        request, weight_request = requests
        plan = request.plan
        results: Tensor = request.new(3, plan.strips)
        launch(
            "clip_rows",
            request.device,
            plan.programs,
            request.addresses,
            weight_request.addresses,
            *request.tables[:2],
            results,
            plan.strips,
            **dict(zip(("FACTOR", "EPS", "FLOOR", "CAP"), limit, strict=True)),
            ERASE=erase,
            WRITE=write,
            ORDER=order,
            ELEMENT=request.element,
            WEIGHT=weight_request.element,
            BLOCK=request.block,
        )
        if write:
            increment_version(gradients)
        return results

    def scale_rows_(self, gradients: TensorList, coefficients: Tensor) -> None:
        """See `Engine.scale_rows_`."""
        request: Any = gradients.note
        _launch_change(request, coefficients, limit=False, shared=False)
        increment_version(gradients)

    def _measure(
        self,
        request: Request,
        order: float,
        *,
        sums: Tensor | None = None,
        norm: Tensor | None = None,
    ) -> None:
        """Launch the kernel that writes the sum of every piece, or the norm of all, or both."""
        totals = arrived = None
        if norm is not None:
            totals, arrived = self._requests.scratch(request.device, request.plan.programs)
        launch(
            "power_sums",
            request.device,
            request.plan.programs,
            request.addresses,
            *request.tables[:2],
            sums,
            totals,
            arrived,
            norm,
            ORDER=order,
            ELEMENT=request.element,
            BLOCK=request.block,
            EACH=sums is not None,
            TOTAL=norm is not None,
        )

    def _change(
        self,
        operators_verb: Callable[..., None],
        tensors: Sequence[Tensor],
        numbers: Tensor,
        rows: bool,
        *,
        limit: bool,
    ) -> None:
        """Scale, or limit, tensors without gaps by a kernel, and the others by torch operators."""
        view = wide_table_view if rows else flat_view
        request = self._requests.of(tensors, rows, view)
        if request is None:
            fit = [view(as_stored(tensor)) is not None for tensor in tensors]
            # All fit, and yet there is no request: a subclass, or a tensor without memory.
            if all(fit) or not any(fit):
                operators_verb(tensors, numbers, rows=rows)
                return
            for group, group_numbers in _grouped(tensors, numbers, rows, fit):
                self._change(operators_verb, group, group_numbers, rows, limit=limit)
            return
        if not len(request.plan.pieces):
            return
        numbers = numbers.to(torch.float64).contiguous()
        _launch_change(request, numbers, limit=limit, shared=numbers.numel() == 1)
        # Autograd cannot see writes by address; which tensors were written, the device alone knows.
        increment_version(tensors)


def _launch_change(request: Request, numbers: Tensor, *, limit: bool, shared: bool) -> None:
    """Launch the kernel that scales, or limits, each strip by its number, or all by one."""
    plan = request.plan
    launch(
        "change",
        request.device,
        plan.writers,
        request.addresses,
        *request.tables[:2],
        numbers,
        plan.programs,
        plan.grouped,
        LIMIT=limit,
        ELEMENT=request.element,
        BLOCK=request.block,
        SHARED=shared,
    )


def _wide_rows(tensor: Tensor) -> Tensor | None:
    """Return a tensor as a table of its rows; one of less than two dimensions is a row."""
    if tensor.dim() < 2:
        return _one_row(tensor)
    view = wide_table_view(tensor)
    # Rows that share memory cannot be scaled apart.
    return None if view is None or view.stride(0) < view.shape[1] else view


def _one_row(tensor: Tensor) -> Tensor | None:
    """Return a tensor as a table of one row; None if there are gaps in its memory."""
    view = flat_view(tensor)
    return None if view is None else view.unsqueeze(0)


def _strip_sums(request: Request, sums: Tensor, order: float) -> Tensor:
    """Return the sum of each strip, from those of its pieces."""
    plan = request.plan
    if plan.whole:
        return sums
    results, first_pieces = request.new(plan.strips), request.tables[2]
    launch("strip_sums", request.device, plan.strips, sums, first_pieces, results, ORDER=order)
    return results


def _grouped(
    tensors: Sequence[Tensor], numbers: Tensor, rows: bool, fit: Sequence[bool]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the tensors that fit, then the others, each time with their numbers."""
    for chosen in (fit, [not fits for fits in fit]):
        group_numbers = numbers
        if numbers.numel() > 1:
            counts = [len(tensor) if rows else 1 for tensor in tensors]
            group_numbers = torch.cat([*compress(numbers.split(counts), chosen)])
        yield [*compress(tensors, chosen)], group_numbers
