"""Which program of a kernel takes which elements: plain arithmetic on lengths.

Every tensor, or row of a tensor, is a strip of elements that lie one beside the other and have a
number of their own. Strips are cut into pieces, and consecutive pieces make up the work of a
program. All of it depends on lengths alone, not on addresses: it is made once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
"""Elements that a program takes at a time."""
PIECE = 16
"""Most blocks of a piece: as many elements are added up in float32 in each lane."""
STRIP_COST = 4
"""What it costs to begin a strip, in blocks."""
PROGRAM_COST = 8
"""Work for which a program is begun, in blocks."""
PROGRAMS = 64
"""Most programs that measure, for each multiprocessor: they are begun as others end."""
WRITERS = 8
"""Most programs that write, for each multiprocessor: mostly they end at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Tables of int64 on the host, and how many programs there are."""

    pieces: Tensor
    """Shape (pieces, 4): index of the tensor, first element, length, index of the strip."""
    starts: Tensor
    """Shape (programs + 1,): the first piece of each program, and the end of the last."""
    first_pieces: Tensor
    """Shape (strips + 1,): the first piece of each strip, and the end of the last."""
    whole: bool
    """Whether every strip is one piece."""
    programs: int
    """How many programs measure."""
    grouped: int
    """Of how many of these a program that writes has the work."""

    @property
    def tables(self) -> list[Tensor]:
        """What the kernels look up."""
        return [self.pieces, self.starts, self.first_pieces]

    @property
    def strips(self) -> int:
        """How many strips there are."""
        return self.first_pieces.numel() - 1

    @property
    def writers(self) -> int:
        """How many programs write."""
        return -(-self.programs // self.grouped)


def plan(
    lengths: Sequence[int],
    counts: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    *,
    processors: int = 1,
    block: int = BLOCK,
) -> Plan:
    """Share out the strips of some tensors among programs.

    Cuts within a strip lie at multiples of a block, so that pieces are aligned as their strip is,
    and their sums do not depend on where it lies.

    Args:
        lengths: Of the strips of each tensor, in elements.
        counts: How many strips each tensor has; one by default.
        strides: Elements from the beginning of a strip to that of the next one.
        processors: How many multiprocessors there are.
        block: Elements of a block.
    """
    tensors, offsets, length = _strips(lengths, counts, strides)
    ends = length.cumsum(0)
    begins = ends - length
    cost = (length + STRIP_COST * block * (length > 0)).cumsum(0)
    total = int(cost[-1]) if len(cost) else 0
    programs = min(max(1, total // (PROGRAM_COST * block)), PROGRAMS * processors)
    # All strips one after the other: every cut is a place among their elements.
    cuts = _cuts_of_programs(length, begins, cost, programs, block)
    stops = torch.cat([_stops(length, begins, PIECE * block), cuts]).unique()
    strip = torch.searchsorted(ends, stops)
    first = stops.diff(prepend=stops.new_zeros(1))  # its length
    at = offsets[strip] + stops - first - begins[strip]
    pieces = torch.stack([tensors[strip], at, first, strip], 1)
    none, count = stops.new_zeros(1), stops.new_full((1,), len(stops))
    starts = torch.cat([none, torch.searchsorted(stops, cuts, right=True), count])
    first_pieces = torch.cat([torch.searchsorted(stops, begins, right=True), count])
    whole = bool((first_pieces.diff() == 1).all())
    grouped = -(-programs // (WRITERS * processors))
    return Plan(pieces, starts, first_pieces, whole, programs, grouped)


def _strips(
    lengths: Sequence[int], counts: Sequence[int] | None, strides: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensor, first element and length of each strip."""
    length = _numbers(lengths)
    tensors = torch.arange(len(length), device="cpu")
    if counts is None or strides is None:
        return tensors, torch.zeros_like(length), length
    many, stride = _numbers(counts), _numbers(strides)
    tensors = tensors.repeat_interleave(many)
    index = torch.arange(len(tensors), device="cpu") - (many.cumsum(0) - many)[tensors]
    return tensors, index * stride[tensors], length[tensors]


def _stops(length: Tensor, begins: Tensor, most: int) -> Tensor:
    """Return where pieces end that are as long as they may be."""
    many = -(-length // most)
    strip = torch.arange(len(length), device="cpu").repeat_interleave(many)
    index = torch.arange(len(strip), device="cpu") - (many.cumsum(0) - many)[strip]
    return begins[strip] + ((index + 1) * most).minimum(length[strip])


def _cuts_of_programs(
    length: Tensor, begins: Tensor, cost: Tensor, programs: int, block: int
) -> Tensor:
    """Return where a program ends and the next one begins, with about the same cost for each."""
    total = int(cost[-1]) if len(cost) else 0
    even = torch.arange(1, programs, device="cpu") * total // programs
    strip = torch.searchsorted(cost, even, right=True)
    own = length[strip] + STRIP_COST * block
    within = (even - (cost[strip] - own) - STRIP_COST * block).clamp(min=0)
    return begins[strip] + within // block * block


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
