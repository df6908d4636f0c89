"""The plan of a launch: every element in one piece, and about the same work for each program."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.common.shapes import gpt2, resnet50, tiny
from gradclip.engines.triton.plan import (
    BLOCK,
    PIECE,
    PROGRAM_COST,
    PROGRAMS,
    STRIP_COST,
    WRITERS,
    Plan,
    plan,
)

TENSOR, FIRST, LENGTH, STRIP = range(4)
H200 = 132
"""Multiprocessors of a large device."""
GIBI = 2**30


def strips(lengths, counts=None, strides=None):
    """Tensor, first element and length of every strip, one by one."""
    for tensor, length in enumerate(lengths):
        for index in range(1 if counts is None else counts[tensor]):
            yield tensor, 0 if strides is None else index * strides[tensor], length


def checked(lengths, counts=None, strides=None, *, processors=1, block=BLOCK) -> Plan:
    """Make a plan, and check the promises of every plan."""
    with torch.device("meta"):  # tables are made on the host, whatever the default device is
        made = plan(lengths, counts, strides, processors=processors, block=block)
    assert all(table.dtype == torch.int64 and table.is_cpu for table in made.tables)
    expected = [*strips(lengths, counts, strides)]
    assert made.strips == len(expected)
    check_pieces(made, expected, block)
    check_programs(made, expected, processors, block)
    return made


def check_pieces(made, expected, block) -> None:
    """Every strip consists of its pieces, one after the other, and of nothing else."""
    pieces, first_pieces = made.pieces.tolist(), made.first_pieces.tolist()
    assert (first_pieces[0], first_pieces[-1]) == (0, len(pieces))
    for index, (tensor, begin, length) in enumerate(expected):
        at = begin
        for piece in pieces[first_pieces[index] : first_pieces[index + 1]]:
            assert (piece[TENSOR], piece[STRIP], piece[FIRST]) == (tensor, index, at)
            assert (at - begin) % block == 0
            assert 0 < piece[LENGTH] <= PIECE * block
            at += piece[LENGTH]
        assert at == begin + length
    counts = [last - first for first, last in itertools.pairwise(first_pieces)]
    assert sum(counts) == len(pieces)
    full = sum(-(-length // (PIECE * block)) for *_, length in expected)
    assert full <= len(pieces) < full + made.programs
    assert made.whole is all(count == 1 for count in counts)


def check_programs(made, expected, processors, block) -> None:
    starts = made.starts.tolist()
    assert len(starts) == made.programs + 1
    assert (starts[0], starts[-1]) == (0, len(made.pieces))
    assert starts == sorted(starts)
    cost = sum(length + STRIP_COST * block for *_, length in expected if length)
    worth = max(1, cost // (PROGRAM_COST * block))
    assert made.programs == min(worth, PROGRAMS * processors)
    assert 1 <= made.writers <= WRITERS * processors
    assert (made.writers - 1) * made.grouped < made.programs <= made.writers * made.grouped
    # A cut lies where the cost is even, or before: by less than a block, or at the strip's start.
    assert max(costs(made, block)) <= cost / made.programs + 1 + (STRIP_COST + 1) * block


def costs(made, block) -> list[int]:
    """The work of each program, in elements; the program with its first piece pays for a strip."""
    first = (made.pieces[:, STRIP].diff(prepend=torch.tensor([-1])) != 0).long()
    cost = torch.cat([torch.zeros(1), made.pieces[:, LENGTH] + STRIP_COST * block * first])
    return cost.long().cumsum(0)[made.starts].diff().tolist()


@st.composite
def tensors(draw):
    """Lengths, in blocks and a rest, of a few tensors with some rows of some stride."""
    block = draw(st.sampled_from([1, 2, 8, 16]))
    length = st.builds(
        lambda blocks, rest: max(0, blocks * block + rest),
        st.sampled_from([0, 0, 1, 3, 4, 9, PIECE, 2 * PIECE, 70, 190]),
        st.integers(-2, 2),
    )
    lengths = draw(st.lists(length, max_size=9))
    counts = [draw(st.integers(0, 5)) for _ in lengths]
    strides = [length + draw(st.integers(0, 40)) for length in lengths]
    return block, lengths, counts, strides


@given(tensors(), st.integers(1, 3), st.booleans())
def test_every_element_is_in_one_piece(drawn, processors, rows):
    block, lengths, counts, strides = drawn
    if rows:
        checked(lengths, counts, strides, processors=processors, block=block)
    else:
        checked(lengths, processors=processors, block=block)


@given(tensors(), st.integers(1, 3))
def test_rows_of_a_piece_may_stay_whole(drawn, processors):
    block, lengths, counts, strides = drawn
    options = {"processors": processors, "block": block, "divide": False}
    made = plan(lengths, counts, strides, **options)
    expected = [*strips(lengths, counts, strides)]
    check_pieces(made, expected, block)
    assert made.starts.tolist() == sorted(made.starts.tolist())
    pieces = made.first_pieces.diff().tolist()
    assert all(
        count == 1
        for count, (*_, length) in zip(pieces, expected, strict=True)
        if 0 < length <= PIECE * block
    )


def test_empty_tensors_and_rows_have_no_piece_and_rows_start_a_stride_apart():
    made = checked([0, 3, 0, 0, 7, 0])
    assert made.pieces.tolist() == [[1, 0, 3, 1], [4, 0, 7, 4]]
    assert made.first_pieces.tolist() == [0, 0, 1, 1, 1, 2, 2]
    made = checked([3, 0, 2], [2, 4, 1], [10, 0, 2])
    assert made.pieces.tolist() == [[0, 0, 3, 0], [0, 10, 3, 1], [2, 0, 2, 6]]
    assert checked([]).pieces.tolist() == []


@pytest.mark.parametrize("processors", [1, 16, H200])
@pytest.mark.parametrize("shapes", [gpt2, resnet50, tiny])
def test_the_gradients_of_models_are_shared_out_evenly(shapes, processors):
    made = checked([*map(prod, shapes())], processors=processors)
    mean = sum(costs(made, BLOCK)) / made.programs
    assert max(costs(made, BLOCK)) < 2 * mean
    if shapes is not tiny:
        assert min(made.programs, made.writers) >= processors


def test_rows_of_a_large_embedding_are_shared_out_evenly():
    made = plan([768], [50257], [768], processors=H200)
    assert made.programs > 10 * H200
    assert made.pieces[:, FIRST].tolist() == [*range(0, 50257 * 768, 768)]
    assert max(costs(made, BLOCK)) < 1.3 * sum(costs(made, BLOCK)) / made.programs


@pytest.mark.parametrize("length", [5 * 2 * GIBI, 5 * 2 * GIBI - 1])
def test_offsets_beyond_32_bits_are_exact(length):
    made = checked([7, length, 7], processors=H200)
    pieces = made.pieces[made.pieces[:, TENSOR] == 1]
    assert pieces[-1, FIRST] > 4 * 2 * GIBI
    assert pieces[:, LENGTH].sum() == length
    made = checked([100, 3], [3, 2], [3 * GIBI, 2])
    assert made.pieces[:3, FIRST].tolist() == [0, 3 * GIBI, 6 * GIBI]
