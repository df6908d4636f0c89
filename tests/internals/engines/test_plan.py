from __future__ import annotations

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


def lengths_of(shapes):
    return [*map(prod, shapes)]


def strips(lengths, counts=None, strides=None):
    """Tensor, first element and length of every strip, one by one."""
    for tensor, length in enumerate(lengths):
        for index in range(1 if counts is None else counts[tensor]):
            yield tensor, 0 if strides is None else index * strides[tensor], length


def checked(lengths, counts=None, strides=None, *, processors=1, block=BLOCK) -> Plan:
    """Make a plan, and check what every plan promises."""
    made = plan(lengths, counts, strides, processors=processors, block=block)
    assert all(table.dtype == torch.int64 and table.is_cpu for table in made.tables)
    expected = [*strips(lengths, counts, strides)]
    assert made.strips == len(expected)
    check_pieces(made, expected, block)
    check_programs(made, expected, processors, block)
    return made


def check_pieces(made, expected, block) -> None:
    """Every strip is the pieces that it is said to have, one after the other, and nothing else."""
    pieces, first_pieces = made.pieces.tolist(), made.first_pieces.tolist()
    assert first_pieces[0] == 0
    assert first_pieces[-1] == len(pieces)
    for index, (tensor, begin, length) in enumerate(expected):
        own = pieces[first_pieces[index] : first_pieces[index + 1]]
        at = begin
        for piece in own:
            assert (piece[TENSOR], piece[STRIP]) == (tensor, index)
            assert piece[FIRST] == at
            assert (at - begin) % block == 0
            assert 0 < piece[LENGTH] <= PIECE * block
            at += piece[LENGTH]
        assert at == begin + length
    each = [last - first for first, last in itertools.pairwise(first_pieces)]
    assert sum(each) == len(pieces)
    assert made.whole is all(many == 1 for many in each)


def check_programs(made, expected, processors, block) -> None:
    starts = made.starts.tolist()
    assert len(starts) == made.programs + 1
    assert starts[0] == 0
    assert starts[-1] == len(made.pieces)
    assert starts == sorted(starts)
    cost = sum(length + STRIP_COST * block for *_, length in expected if length)
    worth = max(1, cost // (PROGRAM_COST * block))
    assert made.programs == min(worth, PROGRAMS * processors)
    assert 1 <= made.writers <= WRITERS * processors
    assert (made.writers - 1) * made.grouped < made.programs <= made.writers * made.grouped
    # A cut lies where the cost is even, or before: by less than a block, or where its strip begins.
    assert max(costs(made, block)) <= cost / made.programs + 1 + (STRIP_COST + 1) * block


def costs(made, block) -> list[int]:
    """What each program has to do, in elements; a strip costs who has its first piece."""
    first = (made.pieces[:, STRIP].diff(prepend=torch.tensor([-1])) != 0).long()
    cost = torch.cat([torch.zeros(1), made.pieces[:, LENGTH] + STRIP_COST * block * first])
    return cost.long().cumsum(0)[made.starts].diff().tolist()


BLOCKS = st.sampled_from([1, 2, 8, 16])
PROCESSORS = st.integers(1, 3)


@st.composite
def tensors(draw):
    """Lengths, in blocks and a rest, of a few tensors with as many rows of such a stride."""
    block = draw(BLOCKS)
    length = st.builds(
        lambda blocks, rest: max(0, blocks * block + rest),
        st.sampled_from([0, 0, 1, 3, 4, 9, PIECE, 2 * PIECE, 70]),
        st.integers(-2, 2),
    )
    lengths = draw(st.lists(length, max_size=9))
    counts = [draw(st.integers(0, 5)) for _ in lengths]
    strides = [length + draw(st.integers(0, 40)) for length in lengths]
    return block, lengths, counts, strides


@given(tensors(), PROCESSORS)
def test_every_element_of_a_tensor_is_in_one_piece(given_, processors):
    block, lengths, _, _ = given_
    checked(lengths, processors=processors, block=block)


@given(tensors(), PROCESSORS)
def test_every_element_of_a_row_is_in_one_piece(given_, processors):
    block, lengths, counts, strides = given_
    checked(lengths, counts, strides, processors=processors, block=block)


@given(st.integers(0, 3000), st.integers(0, 30), BLOCKS, PROCESSORS)
def test_one_long_strip_among_short_ones_is_shared_out(length, others, block, processors):
    lengths = [*range(others), length, *range(others)]
    checked(lengths, processors=processors, block=block)


def test_a_small_tensor_is_one_piece_of_one_program():
    made = checked([5])
    assert made.pieces.tolist() == [[0, 0, 5, 0]]
    assert (made.starts.tolist(), made.first_pieces.tolist()) == ([0, 1], [0, 1])
    assert (made.whole, made.programs, made.grouped, made.writers) == (True, 1, 1, 1)


def test_a_strip_is_cut_where_a_piece_is_full_and_where_a_program_ends():
    full = PIECE * 8
    made = checked([100 * full], block=8)
    assert made.programs == PROGRAMS
    assert made.pieces[:, LENGTH].max() == full
    assert 100 < len(made.pieces) <= 100 + PROGRAMS - 1
    assert not made.whole


def test_what_is_shorter_than_a_piece_is_cut_for_programs_alone():
    made = checked([8 * PROGRAM_COST + 1] * 3, block=8)
    assert made.programs == 4
    assert len(made.pieces) < 3 + made.programs


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_where_there_are_no_elements_there_is_no_piece(lengths):
    made = checked(lengths)
    assert made.pieces.shape == (0, 4)
    assert made.starts.tolist() == [0, 0]
    assert made.first_pieces.tolist() == [0] * (len(lengths) + 1)
    assert made.whole is (not lengths)


def test_empty_tensors_between_others_have_no_piece():
    made = checked([0, 3, 0, 0, 7, 0])
    assert made.pieces.tolist() == [[1, 0, 3, 1], [4, 0, 7, 4]]
    assert made.first_pieces.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert not made.whole


def test_rows_begin_a_stride_apart():
    made = checked([3, 2], [2, 3], [10, 2])
    assert made.pieces[:, :2].tolist() == [[0, 0], [0, 10], [1, 0], [1, 2], [1, 4]]
    assert made.pieces[:, STRIP].tolist() == [0, 1, 2, 3, 4]
    assert made.whole


def test_tensors_without_rows_or_with_rows_of_nothing():
    made = checked([3, 0, 2], [0, 4, 1], [3, 0, 2])
    assert made.pieces.tolist() == [[2, 0, 2, 4]]
    assert made.first_pieces.tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("processors", [1, 16, H200])
@pytest.mark.parametrize("shapes", [gpt2, resnet50, tiny])
def test_the_gradients_of_models_are_shared_out_evenly(shapes, processors):
    made = checked(lengths_of(shapes()), processors=processors)
    mean = sum(costs(made, BLOCK)) / made.programs
    assert max(costs(made, BLOCK)) < 2 * mean
    if shapes is not tiny:
        assert min(made.programs, made.writers) >= processors


def test_rows_of_a_large_embedding_are_shared_out_evenly():
    made = plan([768], [50257], [768], processors=H200)
    assert made.programs > 10 * H200
    assert sum(made.starts.diff()) == made.strips
    assert made.pieces[:, FIRST].tolist() == [*range(0, 50257 * 768, 768)]
    assert max(costs(made, BLOCK)) < 1.3 * sum(costs(made, BLOCK)) / made.programs


@pytest.mark.parametrize("length", [5 * 2 * GIBI, 5 * 2 * GIBI - 1])
def test_offsets_beyond_32_bits_are_exact(length):
    made = checked([7, length, 7], processors=H200)
    at = made.pieces[made.pieces[:, TENSOR] == 1]
    assert at[-1, FIRST] > 4 * 2 * GIBI
    assert at[:, LENGTH].sum() == length
    assert made.programs == PROGRAMS * H200


def test_rows_beyond_32_bits_begin_where_they_should():
    made = checked([100, 3], [3, 2], [3 * GIBI, 2])
    assert made.pieces[:3, FIRST].tolist() == [0, 3 * GIBI, 6 * GIBI]


def test_programs_are_begun_for_work_that_is_worth_it():
    for blocks, programs in ((1, 1), (PROGRAM_COST, 1), (2 * PROGRAM_COST, 2), (8000, PROGRAMS)):
        assert plan([(blocks - STRIP_COST) * 16], block=16).programs == programs
    assert plan([8000 * 16], block=16, processors=3).programs == 3 * PROGRAMS


def test_a_program_that_writes_has_the_work_of_several():
    made = plan([10**6], block=16, processors=2)
    assert made.programs == 2 * PROGRAMS
    assert made.grouped == PROGRAMS // WRITERS
    assert made.writers == 2 * WRITERS


def test_a_plan_depends_on_lengths_alone():
    given_ = lengths_of(resnet50())
    once = plan(given_, processors=3)
    with torch.device("meta"):
        again = plan(tuple(given_), processors=3)
    assert all(map(torch.equal, once.tables, again.tables))
    assert (again.programs, again.grouped, again.whole) == (
        once.programs,
        once.grouped,
        once.whole,
    )
    given_by_rows = plan(given_, [1] * len(given_), [0] * len(given_), processors=3)
    assert all(map(torch.equal, once.tables, given_by_rows.tables))
