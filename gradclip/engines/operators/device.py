"""Every verb off the CPU, where nothing may read a value on the host: that would wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..base import INFINITY, norm_dtype, rounded_bounds
from ..layout import each_place_once, exclusive, overlaps


def power_sums(tensors: Sequence[Tensor], order: float, *, rows: bool) -> Tensor:
    """Return the power sums of all tensors, or of all their rows, in multi-tensor norms."""
    norms = (
        torch.cat([_row_norms(one, order) for one in tensors]) if rows else _norms(tensors, order)
    )
    return norms if order == INFINITY else norms.pow_(order)


def norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all tensors together, shape (1,)."""
    return _norm(_norms(tensors, order), order)


def norm_and_sums(tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, shape (1,), and the power sums of each."""
    norms = _norms(tensors, order)
    norm = _norm(norms, order)
    return norm, norms if order == INFINITY else norms.pow_(order)


def _norm(norms: Tensor, order: float) -> Tensor:
    if norms.dtype is torch.float32:
        return _narrow_norm(norms, order).view(1)
    norm: Tensor = torch.linalg.vector_norm(norms, order, 0, keepdim=True)
    return norm


def _norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    dtype = norm_dtype(tensors[0].device)
    filled = [tensor for tensor in tensors if tensor.numel()]
    if dtype is torch.float32:
        norms = iter([_narrow_norm(tensor, order) for tensor in filled])
    else:
        norms = iter(torch._foreach_norm(filled, order, dtype=dtype) if filled else ())
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return torch.stack([next(norms) if tensor.numel() else zero for tensor in tensors])


def _narrow_norm(tensor: Tensor, order: float) -> Tensor:
    """Return the norm of a tensor, 0-d, where there is no float64 for powers out of range.

    They are those of its elements relative to the largest, which neither overflow nor all vanish.
    """
    numbers = tensor.to(torch.float32)
    largest = numbers.abs().amax()
    scale = torch.where((largest > 0) & (largest < INFINITY), largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(numbers / scale, order) * scale
    return norm


def _row_norms(tensor: Tensor, order: float) -> Tensor:
    dtype = norm_dtype(tensor.device)
    if not tensor.numel():
        return torch.zeros(tensor.shape[0], dtype=dtype, device=tensor.device)
    inside = [*range(1, tensor.dim() + 1)]
    norms: Tensor = torch.linalg.vector_norm(tensor.unsqueeze(-1), order, inside, dtype=dtype)
    return norms


def scale_(tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool) -> None:
    """Multiply tensors, or their rows; also by 1."""
    for memory, coefficient in _with_numbers(tensors, coefficients, rows):
        memory.mul_(coefficient).masked_fill_(coefficient == 0, 0)


def clamp_(tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool) -> None:
    """Limit the elements of tensors, or of their rows; also where they fit."""
    limits = rounded_bounds(bounds, tensors[0].dtype).to(tensors[0].dtype)
    for memory, limit in _with_numbers(tensors, limits, rows):
        memory.clamp_(-limit, limit)


def _with_numbers(
    tensors: Sequence[Tensor], numbers: Tensor, rows: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what to write in place, with one number for all of it or one for each row.

    No number is 0-d, so that a product is computed in the number's own dtype.
    """
    if not rows:
        for tensor, number in zip(tensors, numbers.expand(len(tensors)).split(1), strict=True):
            with exclusive(tensor) as memory:
                yield memory.view(1) if memory.dim() == 0 else memory, number
        return
    counts = [len(tensor) for tensor in tensors]
    for tensor, own in zip(tensors, numbers.expand(sum(counts)).split(counts), strict=True):
        memory = each_place_once(tensor)
        if overlaps(memory):
            yield from _with_numbers(memory.unbind(), own, rows=False)
        else:
            yield memory, own.view(-1, *[1] * (memory.dim() - 1))
