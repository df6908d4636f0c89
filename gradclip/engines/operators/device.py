"""The engine of torch operators on other devices than the CPU, without host syncs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..base import INFINITY, norm_dtype, rounded_bounds
from ..layout import overlaps, stored_once, writable


def power_sums(tensors: Sequence[Tensor], order: float, *, rows: bool) -> Tensor:
    """Return the power sums of all tensors, or of all their rows."""
    norms = (
        torch.cat([_row_norms(tensor, order) for tensor in tensors])
        if rows
        else _norms(tensors, order)
    )
    return norms if order == INFINITY else norms.pow_(order)


def norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all tensors together, shape (1,)."""
    return _norm(_norms(tensors, order), order)


def norm_and_sums(tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, shape (1,), and the power sum of each."""
    norms = _norms(tensors, order)
    norm = _norm(norms, order)
    return norm, norms if order == INFINITY else norms.pow_(order)


def _norm(norms: Tensor, order: float) -> Tensor:
    if norms.dtype is torch.float32:
        return _float32_norm(norms, order).view(1)
    norm: Tensor = torch.linalg.vector_norm(norms, order, 0, keepdim=True)
    return norm


def _norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    dtype = norm_dtype(tensors[0].device)
    # The infinity norm of no elements is an error in torch.
    filled = [tensor for tensor in tensors if tensor.numel()]
    if dtype is torch.float32:
        norms = iter([_float32_norm(tensor, order) for tensor in filled])
    else:
        norms = iter(torch._foreach_norm(filled, order, dtype=dtype) if filled else ())
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return torch.stack([next(norms) if tensor.numel() else zero for tensor in tensors])


def _float32_norm(tensor: Tensor, order: float) -> Tensor:
    """Return the norm of a tensor, 0-d, on a device without float64.

    Elements are divided by the largest one first, so that no power overflows and not all of them
    vanish, then the norm is multiplied by it.
    """
    elements = tensor.to(torch.float32)
    largest = elements.abs().amax()
    # Zeros, NaN and infinity stay what they are.
    scale = torch.where((largest > 0) & (largest < INFINITY), largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(elements / scale, order) * scale
    return norm


def _row_norms(tensor: Tensor, order: float) -> Tensor:
    dtype = norm_dtype(tensor.device)
    if not tensor.numel():
        return torch.zeros(tensor.shape[0], dtype=dtype, device=tensor.device)
    inner = [*range(1, tensor.dim() + 1)]
    # A trailing dimension, since an empty list of dimensions means all of them.
    norms: Tensor = torch.linalg.vector_norm(tensor.unsqueeze(-1), order, inner, dtype=dtype)
    return norms


def scale_(tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool) -> None:
    """Multiply tensors, or their rows; also by 1."""
    for memory, coefficient in _targets(tensors, coefficients, rows):
        # 0 times NaN or infinity is NaN, so zeros are written.
        memory.mul_(coefficient).masked_fill_(coefficient == 0, 0)


def clamp_(tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool) -> None:
    """Limit the elements of tensors, or of their rows; also where they fit."""
    rounded = rounded_bounds(bounds, tensors[0].dtype).to(tensors[0].dtype)
    for memory, bound in _targets(tensors, rounded, rows):
        memory.clamp_(-bound, bound)


def _targets(
    tensors: Sequence[Tensor], numbers: Tensor, rows: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield memory to write in place, with one number for all of it or one for each row.

    No memory is 0-d: torch would then compute in its dtype, not in the wider one of the number.
    """
    if not rows:
        for tensor, number in zip(tensors, numbers.expand(len(tensors)).split(1), strict=True):
            with writable(tensor) as memory:
                yield memory.view(1) if memory.dim() == 0 else memory, number
        return
    counts = [len(tensor) for tensor in tensors]
    by_tensor = numbers.expand(sum(counts)).split(counts)
    for tensor, row_numbers in zip(tensors, by_tensor, strict=True):
        memory = stored_once(tensor)
        if overlaps(memory):
            yield from _targets(memory.unbind(), row_numbers, rows=False)
        else:
            yield memory, row_numbers.view(-1, *[1] * (memory.dim() - 1))
