"""Memory layout: shared elements and rows are found, and views are views."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradclip.engines import layout
from gradclip.engines.layout import blocks, flat, is_plain, overlaps, rows_overlap, table


def count(size: int) -> torch.Tensor:
    return torch.arange(float(size))


SHARING = {
    "expanded": lambda: count(3).view(3, 1).expand(3, 4),
    "expanded 0-d": lambda: torch.tensor(1.0).expand(5),
    "windows": lambda: count(20).as_strided((4, 6), (3, 1), 2),
    "windows with gaps": lambda: count(40).as_strided((3, 4), (4, 2), 5),
    "expanded windows": lambda: count(20).as_strided((2, 4, 6), (0, 3, 1)),
    "expanded twice": lambda: count(3).view(1, 3, 1).expand(2, 3, 4),
}
SEPARATE = {
    "contiguous": lambda: count(6).view(2, 3),
    "0-d": lambda: torch.tensor(1.0),
    "1-d with gaps": lambda: count(10)[::2],
    "empty": lambda: torch.empty(3, 0),
    "no rows": lambda: torch.empty(0, 4),
    "empty expanded": lambda: torch.empty(1, 0).expand(4, 0),
    "transposed": lambda: count(6).view(2, 3).t(),
    "sliced": lambda: count(24).view(4, 6)[1:3, ::2],
    "channels last": lambda: (
        count(48).view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    ),
    "single expanded": lambda: torch.tensor([1.0]).expand(1, 1),
}
SHARING_IN_ROWS = {
    "one row, expanded": lambda: torch.ones(1).expand(1, 5),
    "expanded in a row": lambda: count(4).view(4, 1, 1).expand(4, 3, 2),
    "expanded in a sliced row": lambda: count(8).view(4, 2)[:, :1].expand(4, 3),
    "windows in a row": lambda: count(40).as_strided((4, 3, 4), (10, 2, 1)),
    "transposed and expanded": lambda: count(12).view(3, 4).t().unsqueeze(1).expand(4, 2, 3),
}
EVERY = SHARING | SEPARATE | SHARING_IN_ROWS


def place_count(tensor: torch.Tensor) -> int:
    """How many memory locations there are; the elements of the tensors here tell them apart."""
    return tensor.unique().numel()


@pytest.mark.parametrize("kind", EVERY)
def test_shared_memory_is_found_and_no_false_alarm_raised(kind):
    tensor = EVERY[kind]()
    assert overlaps(tensor) is (kind not in SEPARATE)
    assert is_plain(tensor) is (kind in SEPARATE)
    if tensor.dim():
        shared = place_count(tensor) < sum(place_count(row) for row in tensor)
        assert rows_overlap(tensor) is shared
        assert shared or kind != "windows"
    else:
        assert not rows_overlap(tensor)


@settings(max_examples=300)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strides=st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
def test_shared_memory_is_never_overlooked(shape, strides):
    tensor = count(200).as_strided(shape, strides[: len(shape)])
    if place_count(tensor) < tensor.numel():
        assert overlaps(tensor)
    if place_count(tensor) < sum(place_count(row) for row in tensor):
        assert rows_overlap(tensor)


@pytest.mark.parametrize("kind", EVERY)
def test_flat_and_table_are_contiguous_and_views_if_dense(kind):
    tensor = EVERY[kind]()
    found = flat(tensor)
    assert found.shape == (tensor.numel(),)
    assert found.is_contiguous()
    assert torch.equal(found.sort().values, tensor.flatten().sort().values)
    if kind in ("contiguous", "transposed", "channels last"):
        assert found.data_ptr() == tensor.data_ptr()
    if not tensor.numel() or not tensor.dim():
        return
    rows = table(tensor)
    assert rows.shape == (len(tensor), tensor[0].numel())
    assert rows.shape[1] < 2 or rows.stride(1) == 1
    for row, needed in zip(rows, tensor, strict=True):
        assert torch.equal(row.sort().values, needed.flatten().sort().values)
    if kind in ("contiguous", "channels last"):
        assert table(tensor[1:]).data_ptr() == tensor[1:].data_ptr()


def test_blocks_are_the_table_in_order_and_stay_small(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK", 8)
    for shape in ((5, 3), (1, 30), (3, 20), (4, 8), (9, 1)):
        whole = count(math.prod(shape)).view(shape)
        parts = [*blocks(whole)]
        assert max(part.numel() for part in parts) == parts[0].numel() <= 8
        assert torch.equal(torch.cat([part.flatten() for part in parts]), whole.flatten())


@pytest.mark.parametrize(("rows", "elements", "narrow"), [(65, 63, 1), (64, 63, 0), (65, 64, 0)])
def test_more_than_64_rows_shorter_than_64_are_narrow(rows, elements, narrow):
    """As the README says of rows that are left to torch operators."""
    assert layout.is_narrow(torch.zeros(rows, elements)) == bool(narrow)
