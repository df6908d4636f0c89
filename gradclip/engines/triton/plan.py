"""The plan of a launch: arithmetic on lengths that assigns elements to the programs of a kernel.

Every tensor, or every row, is a strip: contiguous elements with one sum, coefficient or bound.
Strips are cut into pieces, and consecutive pieces are the work of a program. A plan depends on
lengths and not on addresses, so it is made once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 4096
"""Elements that a program takes at a time."""
PIECE = 16
"""Most blocks of a piece, which is the number of elements that a lane adds in float32."""
STRIP_COST = 4
"""Cost of starting a strip, in blocks."""
PROGRAM_COST = 8
"""Work that is worth a program of its own, in blocks."""
PROGRAMS = 64
"""Most programs that measure, for each multiprocessor: some start as others end."""
WRITERS = 8
"""Most programs that write, for each multiprocessor: in most steps they end at once."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Tables of int64 on the host, and the numbers of programs."""

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
    """How many measuring programs' work one writing program has."""

    @property
    def tables(self) -> list[Tensor]:
        """The tables that kernels read."""
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
    divide: bool = True,
) -> Plan:
    """Divide the strips of some tensors among programs.

    Cuts inside a strip lie at multiples of a block, so that pieces are aligned as their strip is
    and the bits of a sum do not depend on its address.

    Args:
        lengths: Length of the strips of each tensor, in elements.
        counts: How many strips each tensor has; one by default.
        strides: Elements from the start of a strip to the start of the next one.
        processors: How many multiprocessors there are.
        block: Elements of a block.
        divide: Whether two programs may have parts of a strip that is no longer than a piece.
    """
    tensors, offsets, length = _strips(lengths, counts, strides)
    ends = length.cumsum(0)
    begins = ends - length
    cost = (length + STRIP_COST * block * (length > 0)).cumsum(0)
    total = int(cost[-1]) if len(cost) else 0
    programs = min(max(1, total // (PROGRAM_COST * block)), PROGRAMS * processors)
    # Positions count elements through all strips, one after the other; a cut is a position.
    undivided = 0 if divide else PIECE * block
    cuts = _cuts_of_programs(length, begins, cost, programs, block, undivided)
    stops = torch.cat([_stops(length, begins, PIECE * block), cuts[cuts > 0]]).unique()
    strip = torch.searchsorted(ends, stops)
    sizes = stops.diff(prepend=stops.new_zeros(1))
    first = offsets[strip] + stops - sizes - begins[strip]
    pieces = torch.stack([tensors[strip], first, sizes, strip], 1)
    zero, count = stops.new_zeros(1), stops.new_full((1,), len(stops))
    starts = torch.cat([zero, torch.searchsorted(stops, cuts, right=True), count])
    first_pieces = torch.cat([torch.searchsorted(stops, begins, right=True), count])
    whole = bool((first_pieces.diff() == 1).all())
    grouped = -(-programs // (WRITERS * processors))
    return Plan(pieces, starts, first_pieces, whole, programs, grouped)


def _strips(
    lengths: Sequence[int], counts: Sequence[int] | None, strides: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensor index, the first element and the length of each strip."""
    length = _numbers(lengths)
    tensors = torch.arange(len(length), device="cpu")
    if counts is None or strides is None:
        return tensors, torch.zeros_like(length), length
    many, stride = _numbers(counts), _numbers(strides)
    tensors = tensors.repeat_interleave(many)
    index = torch.arange(len(tensors), device="cpu") - (many.cumsum(0) - many)[tensors]
    return tensors, index * stride[tensors], length[tensors]


def _stops(length: Tensor, begins: Tensor, most: int) -> Tensor:
    """Return the end positions of pieces of the greatest length, and of strips."""
    many = -(-length // most)
    strip = torch.arange(len(length), device="cpu").repeat_interleave(many)
    index = torch.arange(len(strip), device="cpu") - (many.cumsum(0) - many)[strip]
    return begins[strip] + ((index + 1) * most).minimum(length[strip])


def _cuts_of_programs(
    length: Tensor, begins: Tensor, cost: Tensor, programs: int, block: int, undivided: int
) -> Tensor:
    """Return the positions between programs, for about the same cost each.

    None lies inside a strip of at most ``undivided`` elements.
    """
    total = int(cost[-1]) if len(cost) else 0
    even = torch.arange(1, programs, device="cpu") * total // programs
    strip = torch.searchsorted(cost, even, right=True)
    strip_cost = length[strip] + STRIP_COST * block
    # How much of the strip lies before the cut, once its start is paid for.
    within = (even - (cost[strip] - strip_cost) - STRIP_COST * block).clamp(min=0)
    return begins[strip] + within // block * block * (length[strip] > undivided)


def _numbers(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
