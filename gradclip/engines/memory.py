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


@contextmanager
def exclusive(tensor: Tensor) -> Iterator[Tensor]:
    """Give a tensor that may be written in place and holds each place of ``tensor`` just once.

    Usually that is ``tensor`` itself. For elements that share a place it is a 1-d copy of the
    places, which is written back at the end: every place is written once, and what lies
    between them stays as it is.
    """
    if not overlaps(tensor):
        yield tensor
        return
    places = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device=tensor.device)
    places = places.unique()
    span = tensor.as_strided((int(places[-1]) + 1,), (1,), tensor.storage_offset())
    memory = span[places]
    yield memory
    span[places] = memory


def storage_order(tensor: Tensor) -> Tensor | None:
    """View all elements as a 1-d tensor, in whatever order they lie; None where they have gaps."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
