"""Memory layout of tensors: which elements share memory, views without gaps, and addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LOWEST_ADDRESS = 1 << 32
"""Real tensors rarely lie below; tensors without memory do, at their offset from null."""
PLAIN_TYPES = {Tensor, nn.Parameter}
"""Types whose data pointer can be trusted; a subclass may wrap other tensors."""
NARROW = 64
"""Shorter rows, if there are more than so many of them, are not worth a start of their own."""
CHUNK = 1 << 18
"""Elements to work on at a time so that they stay in cache; a multiple of every piece of a sum."""


def overlaps(tensor: Tensor) -> bool:
    """Return whether elements may share memory, as in an expanded or a windowed tensor.

    True may be a false alarm for exotic strides; False is certain.
    """
    if tensor.is_contiguous():
        return False
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            # All smaller strides together must not reach the next element of this dimension.
            if stride <= extent:
                return tensor.numel() > 0
            extent += stride * (size - 1)
    return False


def rows_overlap(tensor: Tensor) -> bool:
    """Return whether two indices of dimension 0 may share memory.

    True may be a false alarm for exotic strides; False is certain.
    """
    if tensor.is_contiguous() or tensor.dim() == 0 or tensor.shape[0] < 2 or not tensor.numel():
        return False
    steps = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    extent = sum(stride * (size - 1) for stride, size in steps)
    # Rows may interleave without sharing memory, as those of a transposed matrix do.
    return tensor.stride(0) <= extent and overlaps(_without_repeats(tensor, 1))


def is_plain(tensor: Tensor) -> bool:
    """Return whether every element has memory of its own that holds its value."""
    return not (tensor.is_neg() or overlaps(tensor))


@contextmanager
def writable(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor to write in place, with every memory location of ``tensor`` exactly once.

    Usually that is ``tensor`` itself, or the tensor that was expanded. For windows that overlap it
    is a 1-d copy of the locations, written back at the end; gaps between them keep their values.
    Lazily negated elements come as stored: scaling and clamping treat both signs alike.
    """
    once = stored_once(tensor)
    if not overlaps(once):
        yield once
        return
    offsets = offsets_of(once)
    span = once.as_strided((int(offsets[-1]) + 1,), (1,), once.storage_offset())
    offsets = offsets.to(once.device, non_blocking=True)
    memory = span[offsets]
    yield memory
    span[offsets] = memory


def stored_once(tensor: Tensor) -> Tensor:
    """View the elements as stored, with size 1 in every expanded dimension.

    The number of dimensions stays. Windows that overlap keep their shape.
    """
    stored = as_stored(tensor)
    return _without_repeats(stored) if overlaps(stored) else stored


def as_stored(tensor: Tensor) -> Tensor:
    """View lazily negated elements, as ``z.conj().imag`` has them, with their sign in memory."""
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def flat(tensor: Tensor) -> Tensor:
    """Return all elements as a contiguous 1-d tensor, in memory order if there are no gaps.

    A copy only if elements overlap or have gaps between them.
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
    """Return shape (rows, columns): each index of dimension 0 as a contiguous row.

    A copy only if elements of a row overlap or have gaps between them.
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
    """Return whether a tensor has too many and too short rows to start each one separately."""
    rows = len(tensor)
    return rows > NARROW and tensor.numel() < rows * NARROW


def wide_table_view(tensor: Tensor) -> Tensor | None:
    """Return `table` if it is a view and its rows are not narrow, else None."""
    return None if is_narrow(tensor) else table_view(tensor)


def addresses_of(
    tensors: Sequence[Tensor], rows: bool, view: Callable[[Tensor], Tensor | None]
) -> tuple[list[int], Sequence[Tensor]] | None:
    """Return the addresses of tensors, for code that knows addresses and lengths only.

    Args:
        tensors: Tensors of any kind.
        rows: Whether the caller works row by row.
        view: Returns a contiguous form of a tensor, or None if there is none.

    Returns:
        The addresses, and the tensors at these addresses, which the caller must keep alive while
        it uses them; None if a tensor has no usable address.
    """
    # Dynamo cannot trace data_ptr(), and breaks the graph there.
    if torch.compiler.is_compiling() or not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    stored = tensors
    if rows or not all(map(Tensor.is_contiguous, tensors)):
        views = [view(as_stored(tensor)) for tensor in tensors]
        stored = [one for one in views if one is not None]
    if len(stored) < len(tensors):
        return None
    try:
        addresses = [*map(Tensor.data_ptr, stored)]
    except RuntimeError:  # inside a transformation of torch.func
        return None
    if min(addresses, default=LOWEST_ADDRESS) < LOWEST_ADDRESS and not all(map(_is_real, stored)):
        return None
    return addresses, stored


def _is_real(tensor: Tensor) -> bool:
    """Return whether a tensor has memory; without it, its address is its offset from null."""
    offset = tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr() != offset or not tensor.numel()


def _table_shape(tensor: Tensor) -> tuple[int, int]:
    rows = tensor.shape[0]
    return rows, tensor.numel() // max(rows, 1)


def rows_at_once(columns: int) -> int:
    """Return how many rows to work on at a time so that they stay in cache."""
    return max(1, CHUNK // max(1, columns))


def blocks(rows: Tensor) -> Iterator[Tensor]:
    """Yield a table in consecutive blocks that stay in cache: some rows, or a part of one row."""
    for block in rows.split(rows_at_once(rows.shape[1])):
        yield from block.split(CHUNK, 1)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether the elements, in some order, lie in memory without gaps or overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _without_repeats(tensor: Tensor, first: int = 0) -> Tensor:
    """View dimensions of stride 0, from ``first`` on, with size 1."""
    steps = zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
    sizes = [size if stride else 1 for size, stride in steps]
    return tensor.as_strided((*tensor.shape[:first], *sizes), tensor.stride())


def offsets_of(tensor: Tensor) -> Tensor:
    """Return each distinct offset from the first element, sorted.

    Computed on the CPU from strides: a result of unknown size on a device would be a host sync.
    """
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    distinct: Tensor = offsets.unique()
    return distinct
