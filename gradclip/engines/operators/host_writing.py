"""Scaling and limiting on the CPU, where the host looks first and only what changes is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..base import INFINITY, rounded_bounds
from ..layout import each_place_once, exclusive, is_plain, overlaps, rows_at_once
from .host_sums import power_sums

SMALLEST_NORMAL = 2.0**-126

_Change = Callable[[list[Tensor], list[Tensor]], object]
"""What is done in place to each tensor with its number, or with a number for each of its rows."""


def scale_(tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool) -> None:
    """Multiply tensors, or their rows, where the coefficient does not round to 1."""
    if coefficients.numel() == 1 and all(map(is_plain, tensors)):
        coefficient = coefficients.item()
        if coefficient >= SMALLEST_NORMAL:
            _scale_together_(tensors, coefficient)
            return
    if not coefficients.numel():
        return
    factors = coefficients
    if not coefficients.amin().item() >= SMALLEST_NORMAL:
        factors = _scale_by_extremes_(tensors, coefficients, rows)
    if tensors[0].dtype is not torch.float64:
        factors = factors.float()
    _change_where_(factors != 1, tensors, factors, torch._foreach_mul_, rows)


def _scale_together_(tensors: Sequence[Tensor], coefficient: float) -> None:
    """Multiply all tensors by one number: the usual case, in which every call counts."""
    wide = tensors[0].dtype is torch.float64
    # A 0-d tensor is not rounded to the gradients' dtype, as a Python number is for float16.
    dtype = torch.float64 if wide else torch.float32
    factor = torch.scalar_tensor(coefficient, dtype=dtype, device="cpu")
    if factor.item() != 1:
        # Backwards, since the last ones were measured last and may still be in cache.
        torch._foreach_mul_([*reversed(tensors)], factor)


def _scale_by_extremes_(tensors: Sequence[Tensor], coefficients: Tensor, rows: bool) -> Tensor:
    """Write zeros for 0, multiply out what is no normal float32 number; return what is left.

    Such numbers are less exact in float32, and 0 where denormals are flushed.
    """
    _change_where_(coefficients == 0, tensors, coefficients, _erase_, rows)
    factors = coefficients.masked_fill(coefficients == 0, 1)
    if tensors[0].dtype is torch.float64:
        return factors
    while bool((tiny := factors < SMALLEST_NORMAL).any()):
        part = torch.ones_like(factors).masked_fill_(tiny, 2.0**-64)
        _change_where_(tiny, tensors, part.float(), torch._foreach_mul_, rows)
        factors = factors / part
    return factors


def _erase_(memories: list[Tensor], _: list[Tensor]) -> None:
    torch._foreach_zero_(memories)


def clamp_(tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool) -> None:
    """Limit the elements of tensors, or of their rows, where the largest one does not fit."""
    limits = rounded_bounds(bounds, tensors[0].dtype)
    largest = power_sums(tensors, INFINITY, rows=rows)
    if bool((largest.isnan() & (limits < INFINITY)).any()):
        # A NaN counts as the largest, and hides what is too large or fits.
        numbers = [tensor.nan_to_num(0, INFINITY, -INFINITY) for tensor in tensors]
        largest = power_sums(numbers, INFINITY, rows=rows)
    _change_where_(largest > limits, tensors, limits.to(tensors[0].dtype), _limit_, rows)


def _limit_(memories: list[Tensor], limits: list[Tensor]) -> None:
    for memory, limit in zip(memories, limits, strict=True):
        memory.clamp_(-limit, limit)


def _change_where_(
    chosen: Tensor, tensors: Sequence[Tensor], numbers: Tensor, change_: _Change, rows: bool
) -> None:
    """Change the tensors, or their rows, that are chosen; one choice or number serves all."""
    if not bool(chosen.any()):
        return
    numbers = numbers.expand(len(chosen)) if len(chosen) > 1 else numbers
    if rows and len(chosen) > 1:
        _change_rows_(chosen, tensors, numbers, change_)
    else:
        _change_tensors_(chosen, tensors, numbers, change_)


def _change_tensors_(
    chosen: Tensor, tensors: Sequence[Tensor], numbers: Tensor, change_: _Change
) -> None:
    if len(chosen) == 1:
        each = zip(tensors, repeat(numbers[0]), repeat(True))
    else:
        each = zip(tensors, numbers.unbind(), chosen.tolist(), strict=True)
    memories: list[Tensor] = []
    beside: list[Tensor] = []
    for tensor, number, is_chosen in each:
        if not is_chosen:
            continue
        if is_plain(tensor):
            memories.append(tensor)
            beside.append(number)
            continue
        with exclusive(tensor) as memory:
            change_([memory], [number])
    if memories:
        # Backwards, since the last ones were measured last and may still be in cache.
        change_(memories[::-1], beside[::-1])


def _change_rows_(
    chosen: Tensor, tensors: Sequence[Tensor], numbers: Tensor, change_: _Change
) -> None:
    counts = [len(tensor) for tensor in tensors]
    lengths = torch.tensor(counts, dtype=torch.int64, device="cpu")
    totals = torch.segment_reduce(chosen.double(), "sum", lengths=lengths, unsafe=True)
    memories: list[Tensor] = []
    beside: list[Tensor] = []
    first = 0
    for tensor, count, total in zip(tensors, counts, totals.tolist(), strict=True):
        own = slice(first, first + count)
        first += count
        if not total:
            continue
        memory = each_place_once(tensor)
        at_once = rows_at_once(memory[:1].numel())
        shape = (-1, *[1] * (memory.dim() - 1))
        if overlaps(memory):
            _change_one_by_one_(chosen[own], memory, numbers[own], change_)
        elif total == count:
            memories += memory.split(at_once)
            beside += numbers[own].view(shape).split(at_once)
        else:
            (index,) = torch.where(chosen[own])
            for some in index.split(at_once):
                part = memory[some]
                change_([part], [numbers[own][some].view(shape)])
                memory.index_copy_(0, some, part)
    if memories:
        change_(memories, beside)


def _change_one_by_one_(chosen: Tensor, rows: Tensor, numbers: Tensor, change_: _Change) -> None:
    """Change rows inside which windows overlap, which no training makes."""
    for index in chosen.nonzero().flatten().tolist():
        one = slice(index, index + 1)
        _change_tensors_(chosen[one], [rows[index]], numbers[one], change_)
