from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.engines import layout as memory
from gradclip.engines.layout import (
    blocks,
    flat,
    is_plain,
    overlaps,
    rows_overlap,
    stored_once,
    table,
    writable,
)

SHARING = {
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 4),
    "expanded 0-d": lambda: torch.tensor(1.0).expand(5),
    "windows": lambda: torch.arange(20.0).as_strided((4, 6), (3, 1), 2),
    "windows with gaps": lambda: torch.arange(40.0).as_strided((3, 4), (4, 2), 5),
    "expanded windows": lambda: torch.arange(20.0).as_strided((2, 4, 6), (0, 3, 1)),
}
SEPARATE = {
    "contiguous": lambda: torch.arange(6.0).view(2, 3),
    "0-d": lambda: torch.tensor(1.0),
    "empty": lambda: torch.empty(3, 0),
    "empty expanded": lambda: torch.empty(1, 0).expand(4, 0),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "sliced": lambda: torch.arange(24.0).view(4, 6)[1:3, ::2],
    "channels last": lambda: (
        torch.arange(48.0).view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    ),
    "single expanded": lambda: torch.tensor([1.0]).expand(1, 1),
}


@pytest.mark.parametrize("kind", SHARING)
def test_elements_that_share_a_place_are_found(kind):
    assert overlaps(SHARING[kind]())


@pytest.mark.parametrize("kind", SEPARATE)
def test_elements_with_places_of_their_own_raise_no_alarm(kind):
    tensor = SEPARATE[kind]()
    assert not overlaps(tensor)
    assert is_plain(tensor)
    with writable(tensor) as places:
        assert places is tensor


@pytest.mark.parametrize("kind", SHARING)
def test_each_place_is_given_once_and_written_back(kind):
    tensor = SHARING[kind]()
    before = torch.empty(0).set_(tensor.untyped_storage()).clone()
    needed = tensor + 100
    with writable(tensor) as places:
        assert places.numel() == tensor.unique().numel()
        places += 100
    assert torch.equal(tensor, needed)
    after = torch.empty(0).set_(tensor.untyped_storage())
    assert int((after != before).sum()) == tensor.unique().numel()


@pytest.mark.parametrize("kind", SEPARATE | SHARING)
def test_flat_holds_all_elements_contiguously(kind):
    tensor = (SEPARATE | SHARING)[kind]()
    found = flat(tensor)
    assert found.shape == (tensor.numel(),)
    assert found.is_contiguous()
    assert torch.equal(found.sort().values, tensor.flatten().sort().values)


@pytest.mark.parametrize("kind", ["contiguous", "transposed", "channels last"])
def test_dense_tensors_are_flattened_without_a_copy(kind):
    tensor = SEPARATE[kind]()
    assert flat(tensor).data_ptr() == tensor.data_ptr()


APART = {
    "contiguous": lambda: torch.arange(12.0).view(3, 4),
    "1-d": lambda: torch.arange(5.0),
    "1-d with gaps": lambda: torch.arange(10.0)[::2],
    "no rows": lambda: torch.empty(0, 4),
    "rows of nothing": lambda: torch.empty(1, 0).expand(4, 0),
    "one row, expanded": lambda: torch.ones(1).expand(1, 5),
    "expanded within a row": lambda: torch.arange(4.0).view(4, 1, 1).expand(4, 3, 2),
    "expanded within a sliced row": lambda: torch.arange(8.0).view(4, 2)[:, :1].expand(4, 3),
    "expanded in the middle": lambda: torch.arange(8.0).view(4, 1, 2).expand(4, 3, 2),
    "windows within a row": lambda: torch.arange(40.0).as_strided((4, 3, 4), (10, 2, 1)),
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "channels last": lambda: (
        torch.arange(48.0).view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    ),
    "sliced": lambda: torch.arange(24.0).view(4, 6)[1:3, ::2],
    "transposed and expanded within a row": lambda: (
        torch.arange(12.0).view(3, 4).t().unsqueeze(1).expand(4, 2, 3)
    ),
}
TOGETHER = {
    "expanded": lambda: torch.arange(4.0).expand(3, 4),
    "expanded 1-d": lambda: torch.ones(1).expand(3),
    "windows": lambda: torch.arange(20.0).as_strided((4, 6), (3, 1), 2),
    "windows with gaps": lambda: torch.arange(40.0).as_strided((3, 4), (4, 2), 5),
    "all expanded": lambda: torch.tensor(1.0).expand(2, 3),
    "expanded twice": lambda: torch.arange(3.0).view(1, 3, 1).expand(2, 3, 4),
}


def place_count(tensor: torch.Tensor) -> int:
    """How many places there are; the elements of the tensors here tell them apart."""
    return tensor.unique().numel()


@pytest.mark.parametrize("kind", APART)
def test_rows_with_places_of_their_own_raise_no_alarm(kind):
    tensor = APART[kind]()
    assert place_count(tensor) == sum(place_count(row) for row in tensor)
    assert not rows_overlap(tensor)


@pytest.mark.parametrize("kind", TOGETHER)
def test_rows_that_share_a_place_are_found(kind):
    assert rows_overlap(TOGETHER[kind]())


def test_a_tensor_without_dimensions_has_no_rows_to_share():
    assert not rows_overlap(torch.tensor(1.0))


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strides=st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
def test_shared_places_are_never_overlooked(shape, strides):
    tensor = torch.arange(200.0).as_strided(shape, strides[: len(shape)])
    if place_count(tensor) < tensor.numel():
        assert overlaps(tensor)
    if place_count(tensor) < sum(place_count(row) for row in tensor):
        assert rows_overlap(tensor)


@pytest.mark.parametrize("kind", [kind for kind in APART if APART[kind]().numel()])
def test_a_table_holds_each_row_contiguously(kind):
    tensor = APART[kind]()
    found = table(tensor)
    assert found.shape == (len(tensor), tensor[0].numel())
    assert found.shape[1] < 2 or found.stride(1) == 1
    for row, needed in zip(found, tensor, strict=True):
        assert torch.equal(row.sort().values, needed.flatten().sort().values)


@pytest.mark.parametrize("kind", ["contiguous", "channels last"])
def test_dense_rows_are_tabled_without_a_copy(kind):
    tensor = APART[kind]()
    assert table(tensor).data_ptr() == tensor.data_ptr()
    part = tensor[1:]
    assert table(part).data_ptr() == part.data_ptr()


def test_lazily_negated_and_expanded_elements_are_viewed_where_they_lie():
    base = torch.arange(1.0, 5.0)
    once = stored_once(torch._neg_view(base.view(4, 1, 1).expand(4, 3, 2)))
    assert once.shape == (4, 1, 1)
    assert once.data_ptr() == base.data_ptr()
    assert torch.equal(once.flatten(), base)


def test_blocks_are_the_table_in_order_and_stay_small(monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", 8)
    for shape in ((5, 3), (1, 30), (3, 20), (4, 8), (9, 1)):
        whole = torch.arange(float(math.prod(shape))).view(shape)
        parts = [*blocks(whole)]
        assert max(part.numel() for part in parts) <= 8
        assert parts[0].numel() == max(part.numel() for part in parts)
        assert torch.equal(torch.cat([part.flatten() for part in parts]), whole.flatten())
