"""Tensors that share memory with each other, and a way to scale each place once.

Autograd leaves such gradients behind: those of the parts of ``torch.stack(parts).mean(0)`` are all
the same memory. Scaled one after the other, a place would be scaled once for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from operator import add
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .layout import LOWEST_ADDRESS, as_stored, flat_view, offsets_of


class Scale(Protocol):
    """`Engine.scale_`."""

    def __call__(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """Multiply tensors that share nothing with each other."""


TRIALS = 1000
"""Steps of the search for a common place, after which two tensors count as sharing memory."""


class Span(NamedTuple):
    """The addresses between which a tensor lies."""

    start: int
    end: int
    position: int
    """Of the tensor in its list."""


class Layout(NamedTuple):
    """Where the elements of a tensor lie, in elements."""

    offset: int
    """Of the first one."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def sharing(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the positions of tensors that share memory, a list for each memory. No host sync.

    Empty as a rule, and then found within 0.3 us for each tensor. Columns of one matrix lie between
    each other and share nothing.

    Args:
        tensors: Tensors of one device and dtype, with addresses.
    """
    if all(map(Tensor.is_contiguous, tensors)) and are_apart(
        [*map(Tensor.data_ptr, tensors)], [tensor.nbytes for tensor in tensors]
    ):
        return []
    spans = sorted(filter(None, map(_span, tensors, range(len(tensors)))))
    groups: list[list[int]] = []
    for crowd in _crowds(spans):
        members, start = [tensors[span.position] for span in crowd], crowd[0].start
        layouts = tuple(_layout(tensor, start) for tensor in members)
        groups += [[crowd[place].position for place in group] for group in _connected(layouts)]
    return groups


def are_apart(addresses: Sequence[int], lengths: Sequence[int]) -> bool:
    """Return whether pieces of memory do not overlap.

    Args:
        addresses: Their first bytes.
        lengths: Their numbers of bytes.
    """
    starts = sorted(zip(addresses, map(add, addresses, lengths), strict=True))
    return all(end <= start for (_, end), (start, _) in pairwise(starts))


def scale_once_(
    scale_: Scale, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool
) -> None:
    """Multiply tensors, each place in memory once.

    Gradients that share memory get one factor, the smallest of their coefficients: a larger one
    would leave a norm above its threshold.

    Args:
        scale_: Scales tensors that share nothing.
        tensors: Tensors of one device and dtype.
        coefficients: As for `Engine.scale_`.
        rows: As for `Engine.scale_`.
    """
    groups = sharing(tensors)
    if not groups:
        scale_(tensors, coefficients, rows=rows)
        return
    counts = [len(tensor) if rows else 1 for tensor in tensors]
    by_tensor = coefficients.expand(sum(counts)).split(counts)
    shared = {*chain.from_iterable(groups)}
    others = [index for index in range(len(tensors)) if index not in shared]
    if others:
        chosen = torch.cat([by_tensor[index] for index in others])
        scale_([tensors[index] for index in others], chosen, rows=rows)
    for group in groups:
        members = [tensors[index] for index in group]
        own = torch.cat([by_tensor[index] for index in group])
        if rows:
            every_row = [row for member in members for row in member]
            scale_once_(scale_, every_row, own, rows=False)
        else:
            _scale_together_(scale_, members, own.amin(0, keepdim=True))


def _scale_together_(scale_: Scale, tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    if coefficient.is_cpu and coefficient.item() == 1:
        return  # the copies below would be written back
    first = as_stored(min(tensors, key=Tensor.data_ptr))
    if all(flat_view(as_stored(tensor)) is not None for tensor in tensors):
        # Tensors without gaps, each of which overlaps another one, leave no gap between them.
        ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
        length = (max(ends) - first.data_ptr()) // first.element_size()
        scale_([first.as_strided((length,), (1,), first.storage_offset())], coefficient)
        return
    starts = [(t.data_ptr() - first.data_ptr()) // first.element_size() for t in tensors]
    offsets = [start + offsets_of(tensor) for start, tensor in zip(starts, tensors, strict=True)]
    places = torch.cat(offsets).unique()
    span = first.as_strided((int(places[-1]) + 1,), (1,), first.storage_offset())
    places = places.to(first.device, non_blocking=True)
    memory = span[places]
    scale_([memory], coefficient)
    span[places] = memory


def _span(tensor: Tensor, position: int) -> Span | None:
    start = tensor.data_ptr()
    if start < LOWEST_ADDRESS or not tensor.numel():
        return None  # without memory
    extent = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        extent = 1 + sum(stride * (size - 1) for stride, size in steps)
    return Span(start, start + extent * tensor.element_size(), position)


def _crowds(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Yield spans that overlap, directly or by others between them; two or more at a time."""
    crowd: list[Span] = []
    end = 0
    for span in spans:
        if span.start >= end:
            if len(crowd) > 1:
                yield crowd
            crowd = []
        crowd.append(span)
        end = max(end, span.end)
    if len(crowd) > 1:
        yield crowd


def _layout(tensor: Tensor, start: int) -> Layout:
    offset = (tensor.data_ptr() - start) // tensor.element_size()
    return Layout(offset, tuple(tensor.shape), tensor.stride())


# Cached: columns of a matrix are the same at every step, and many.
@lru_cache(maxsize=256)
def _connected(layouts: tuple[Layout, ...]) -> list[list[int]]:
    """Return the positions of tensors that are connected by places that two of them have."""
    groups: list[list[int]] = []
    for index, layout in enumerate(layouts):
        near = [g for g in groups if any(_have_common_place(layouts[i], layout) for i in g)]
        groups = [group for group in groups if group not in near]
        groups.append([*chain.from_iterable(near), index])
    return [group for group in groups if len(group) > 1]


def _have_common_place(one: Layout, other: Layout) -> bool:
    """Return whether an element of one tensor lies where one of the other does.

    True if the distance of the tensors is a sum of multiples of their strides. A search from the
    largest stride down finds or excludes that, in a few steps for the strides of usual tensors.
    """
    # A step along a dimension of `one` adds its stride to the distance, of `other` takes it away.
    reach: dict[int, list[int]] = {}
    for layout, side in ((one, 1), (other, 0)):
        for stride, size in zip(layout.strides, layout.shape, strict=True):
            if stride and size > 1:
                reach.setdefault(stride, [0, 0])[side] += size - 1
    strides = sorted(reach, reverse=True)
    trials = 0

    def reached(distance: int, level: int) -> bool:
        nonlocal trials
        trials += 1
        if level == len(strides) or trials > TRIALS:
            return distance == 0 or trials > TRIALS
        (down, up), stride = reach[strides[level]], strides[level]
        smaller = strides[level + 1 :]
        below, above = (sum(s * reach[s][side] for s in smaller) for side in (0, 1))
        first, last = -((above - distance) // stride), (distance + below) // stride
        steps = range(max(first, -down), min(last, up) + 1)
        return any(reached(distance - step * stride, level + 1) for step in steps)

    return reached(other.offset - one.offset, 0)
