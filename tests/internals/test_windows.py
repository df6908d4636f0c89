"""The window of a rule: its free slots, and its norms in ascending order."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.thresholds import window as windows
from gradclip.thresholds.window import NormWindow, OrderedNorms
from tests.support.engines import vector

FREE = torch.finfo(torch.float64).max
NORMS = st.one_of(st.sampled_from([0.0, 1.0, 2.0, FREE]), st.floats(0, 1e308))


def test_states_of_float32():
    """Free slots hold the largest number of float64, whatever was loaded."""
    ring = NormWindow(3)
    state = ring.fresh(1, torch.device("cpu"), torch.float64)
    state["window"].copy_(vector(1.0, 2.0, 0.25))
    state["counts"].fill_(2)
    ring.follow(state)
    assert state["window"].tolist() == [[1.0, 2.0, FREE]]
    # A ring of float32 returns the norm that it holds: the sorted norms would lose it otherwise.
    ring = NormWindow(2)
    ring.follow(ring.fresh(1, torch.device("cpu"), torch.float32))
    _, entering = ring.add(0.1, None)
    assert entering == ring.norms[0, 0].item() == torch.tensor(0.1).item()


def ordered(norms: torch.Tensor) -> OrderedNorms:
    made = OrderedNorms(norms)
    made.sort_(norms)
    return made


def sorted_rows(norms: OrderedNorms) -> torch.Tensor:
    return norms._bounded[:, 1:-2]


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([1, 8, 10**6]))
def test_rows_stay_in_order_as_norms_come_and_go(data, rows, length, block):
    """As sorting them anew at each step would do, in blocks of any size."""
    values = data.draw(st.lists(NORMS, min_size=rows * length, max_size=rows * length))
    norms = vector(*values).view(rows, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_BLOCK", block)
        sorted_norms = ordered(norms)
    for _ in range(4):
        slot = data.draw(st.integers(0, length - 1))
        entering = vector(*data.draw(st.lists(NORMS, min_size=rows, max_size=rows)))
        leaving, entering = norms[:, slot : slot + 1].clone(), entering.clamp(max=FREE).unsqueeze(1)
        if rows == 1 and data.draw(st.booleans()):
            sorted_norms.replace_(leaving.item(), entering.item())
        else:
            sorted_norms.replace_(leaving.t(), entering.t())
        norms[:, slot] = entering.squeeze(1)
        assert torch.equal(sorted_rows(sorted_norms), norms.sort(dim=1).values)
    assert sorted_norms._bounded[:, [0, -2, -1]].tolist() == [[0.0, FREE, FREE]] * rows


@settings(max_examples=60)
@given(st.lists(NORMS, min_size=1, max_size=7), st.one_of(NORMS, st.just(math.inf)), st.data())
def test_the_order_with_another_norm(values, another, data):
    """Numbers and tensors find the two order statistics that sorting the longer row finds."""
    rank = data.draw(st.integers(0, len(values)))
    longer = [*sorted([*values, min(another, FREE)]), FREE]
    norms = ordered(vector(*values).unsqueeze(0))
    assert norms.with_another(float(rank), another) == tuple(longer[rank : rank + 2])
    pair = norms.with_another(vector(rank), vector(another))
    assert [bound.tolist() for bound in pair] == [[longer[rank]], [longer[rank + 1]]]


def test_rows_of_the_same_kind_are_sorted_in_the_same_memory():
    """A captured CUDA graph reads it there."""
    norms, other = ordered(torch.tensor([[2.0, 1.0], [0.0, 0.0]])), torch.tensor([[5.0, 3.0]] * 2)
    address = norms._bounded.data_ptr()
    norms.sort_(other)
    assert norms.fits(other)
    assert (norms._bounded.data_ptr(), sorted_rows(norms).tolist()) == (address, [[3.0, 5.0]] * 2)
    for unfit in (other[:1], other[:, :1], other.double(), other.to("meta")):
        assert not norms.fits(unfit)
