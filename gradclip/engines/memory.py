"""How a tensor lies in memory: which of its elements share a place, and in which order they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
    once = torch._neg_view(tensor) if tensor.is_neg() else tensor
    if overlaps(once):
        steps = [step for step in zip(once.shape, once.stride(), strict=True) if step[1]]
        once = once.as_strided([size for size, _ in steps], [stride for _, stride in steps])
    if not overlaps(once):
        yield once
        return
    places = _places(once)
    span = once.as_strided((int(places[-1]) + 1,), (1,), once.storage_offset())
    places = places.to(once.device, non_blocking=True)
    memory = span[places]
    yield memory
    span[places] = memory


def flat(tensor: Tensor) -> Tensor:
    """Return all elements as a contiguous 1-d tensor, in whatever order they lie.

    A view, unless elements share places or have gaps between them.
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return tensor.contiguous().view(-1)
            expected *= size
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _places(tensor: Tensor) -> Tensor:
    """Return the offsets from the first element, sorted, each once; on the CPU, without looking."""
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    distinct: Tensor = places.unique()
    return distinct
