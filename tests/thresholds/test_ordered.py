from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.thresholds import window as ordered
from gradclip.thresholds.window import Ordered

FREE = torch.finfo(torch.float64).max
VALUES = st.one_of(st.sampled_from([0.0, 1.0, 2.0, FREE]), st.floats(0, 1e308))


def rows_of(these):
    return these._bounded[:, 1:-2]


def made(norms):
    these = Ordered(norms)
    these.sort_(norms)
    return these


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 8, 10**6]))
def test_it_stays_in_order_as_norms_come_and_go(data, rows, length, block):
    values = data.draw(st.lists(VALUES, min_size=rows * length, max_size=rows * length))
    norms = torch.tensor(values, dtype=torch.float64).view(rows, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordered, "_BLOCK", block)
        these = made(norms)
    for _ in range(4):
        place = data.draw(st.integers(0, length - 1))
        entering = torch.tensor(data.draw(st.lists(VALUES, min_size=rows, max_size=rows)))
        entering = entering.double().clamp(max=FREE).unsqueeze(1)
        these.replace_(norms[:, place : place + 1].clone(), entering)
        norms[:, place] = entering.squeeze(1)
        assert torch.equal(rows_of(these), norms.sort(dim=1).values)
    assert these._bounded[:, [0, -2, -1]].tolist() == [[0.0, FREE, FREE]] * rows


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=7), VALUES, st.data())
def test_it_knows_the_order_with_another_norm(values, another, data):
    norms = torch.tensor([values], dtype=torch.float64)
    rank = data.draw(st.integers(0, len(values)))
    longer = [*sorted([*values, another]), FREE]
    these = made(norms)
    assert these.one_with_another(rank, another) == tuple(longer[rank : rank + 2])
    pair = these.with_another(torch.tensor([rank]), torch.tensor([another], dtype=torch.float64))
    assert [each.tolist() for each in pair] == [[longer[rank]], [longer[rank + 1]]]


def test_it_is_sorted_anew_in_the_same_memory():
    these = made(torch.tensor([[2.0, 1.0]]))
    at = these._bounded.data_ptr()
    these.sort_(torch.tensor([[5.0, 3.0]]))
    assert rows_of(these).tolist() == [[3.0, 5.0]]
    assert these._bounded.data_ptr() == at


@pytest.mark.parametrize(
    ("other", "fits"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(3, 3), False),
        (torch.zeros(2, 4), False),
        (torch.zeros(2, 3, dtype=torch.float64), False),
        (torch.zeros(2, 3, device="meta"), False),
    ],
)
def test_it_knows_what_fits(other, fits):
    assert Ordered(torch.zeros(2, 3)).fits(other) == fits
