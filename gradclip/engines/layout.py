"""How a tensor lies in memory: which of its elements share a place, and in which order they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LOW = 1 << 32
"""Few addresses are lower, those of tensors without memory among them."""
PLAIN = {Tensor, nn.Parameter}
"""Types of tensors that have the memory they say."""
NARROW = 64
"""Elements of a row that is worth a beginning of its own, where there are many rows."""
CHUNK = 1 << 18
"""Elements to work on at a time, a multiple of what is summed at once."""


def overlaps(tensor: Tensor) -> bool:
    """Tell whether some elements may share a place, as in an expanded or windowed tensor.

    True may be a false alarm for exotic strides, False never is.
    """
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() > 0
            reach += stride * (size - 1)
    return False


def rows_overlap(tensor: Tensor) -> bool:
    """Tell whether two indices of dimension 0 may touch the same place.

    True may be a false alarm for exotic strides, False never is.
    """
    if tensor.is_contiguous() or tensor.dim() == 0 or tensor.shape[0] < 2 or not tensor.numel():
        return False
    steps = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    reach = sum(stride * (size - 1) for stride, size in steps)
    return tensor.stride(0) <= reach and overlaps(_without_repeats(tensor, 1))


def is_plain(tensor: Tensor) -> bool:
    """Tell whether every element has a place of its own which holds its value."""
    return not (tensor.is_neg() or overlaps(tensor))


@contextmanager
def exclusive(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor that may be written in place and holds each place of ``tensor`` just once.

    Usually that is ``tensor`` itself, or for an expanded one what was expanded. For windows that
    overlap it is a 1-d copy of the places, which is written back at the end: every place is
    written once, and what lies between them stays as it is. Lazily negated elements are given as
    they lie in memory: to multiply or to limit them is the same.
    """
    once = each_place_once(tensor)
    if not overlaps(once):
        yield once
        return
    places = _places(once)
    span = once.as_strided((int(places[-1]) + 1,), (1,), once.storage_offset())
    places = places.to(once.device, non_blocking=True)
    memory = span[places]
    yield memory
    span[places] = memory


def each_place_once(tensor: Tensor) -> Tensor:
    """View what was expanded, and lazily negated elements as they lie in memory.

    The number of dimensions stays. Windows that overlap are left as they are.
    """
    once = as_it_lies(tensor)
    return _without_repeats(once) if overlaps(once) else once


def as_it_lies(tensor: Tensor) -> Tensor:
    """View the elements of a lazily negated tensor as they lie in memory."""
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def flat(tensor: Tensor) -> Tensor:
    """Return all elements as a contiguous 1-d tensor, in whatever order they lie.

    A view, unless elements share places or have gaps between them.
    """
    view = flat_view(tensor)
    return tensor.contiguous().view(-1) if view is None else view


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return `flat` if it is a view, else None."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not _is_dense(tensor.shape, tensor.stride()):
        return None
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def table(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor, each contiguous in whatever order it lies.

    A view of shape (rows, columns), unless elements of a row share places or have gaps between
    them.
    """
    view = table_view(tensor)
    return tensor.contiguous().view(_table_shape(tensor)) if view is None else view


def table_view(tensor: Tensor) -> Tensor | None:
    """Return `table` if it is a view, else None."""
    if tensor.is_contiguous():
        return tensor.view(_table_shape(tensor))
    if not _is_dense(tensor.shape[1:], tensor.stride()[1:]):
        return None
    strides = (tensor.stride(0), 1)
    return tensor.as_strided(_table_shape(tensor), strides, tensor.storage_offset())


def is_narrow(tensor: Tensor) -> bool:
    """Tell whether the rows of a tensor are too many and too short to take them one by one."""
    rows = len(tensor)
    return rows > NARROW and tensor.numel() < rows * NARROW


def wide_table_view(tensor: Tensor) -> Tensor | None:
    """Return `table` if it is a view and not narrow, else None."""
    return None if is_narrow(tensor) else table_view(tensor)


def addresses_of(
    tensors: Sequence[Tensor], rows: bool, seen: Callable[[Tensor], Tensor | None]
) -> tuple[list[int], Sequence[Tensor]] | None:
    """Return where tensors begin, for code that knows addresses and lengths alone.

    Args:
        tensors: Any.
        rows: Whether row by row.
        seen: Makes what is not contiguous so, or returns None if it cannot.

    Returns:
        The addresses, and the tensors that have this memory, to be kept as long as it is used;
        None where a tensor has no memory that can be described.
    """
    # Dynamo, which traces when it is compiling, would stop at an address.
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)):
        return None
    held = tensors
    if rows or not all(map(Tensor.is_contiguous, tensors)):
        views = [seen(as_it_lies(tensor)) for tensor in tensors]
        held = [view for view in views if view is not None]
    if len(held) < len(tensors):
        return None
    try:
        addresses = [*map(Tensor.data_ptr, held)]
    except RuntimeError:  # within a transformation of torch.func
        return None
    if min(addresses, default=LOW) < LOW and not all(map(_has_memory, held)):
        return None
    return addresses, held


def _has_memory(tensor: Tensor) -> bool:
    """Tell whether the address of a tensor is more than its distance from the null pointer."""
    away = tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr() != away or not tensor.numel()


def _table_shape(tensor: Tensor) -> tuple[int, int]:
    rows = tensor.shape[0]
    return rows, tensor.numel() // max(rows, 1)


def rows_at_once(columns: int) -> int:
    """Return how many rows to work on at a time: few enough to stay in cache."""
    return max(1, CHUNK // max(1, columns))


def blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield consecutive parts of a table, rows or one part of a row, that stay in cache."""
    for part in rows.split(rows_at_once(rows.shape[1])):
        yield from part.split(CHUNK, 1)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Tell whether elements in some order lie one beside the other."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _without_repeats(tensor: Tensor, first: int = 0) -> Tensor:
    """View one index alone of each dimension along which nothing moves, from ``first`` on."""
    steps = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
    sizes = [size if stride else 1 for size, stride in steps]
    return tensor.as_strided((*tensor.shape[:first], *sizes), tensor.stride())


def _places(tensor: Tensor) -> Tensor:
    """Return the offsets from the first element, sorted, each once; on the CPU, without looking."""
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    distinct: Tensor = places.unique()
    return distinct
