"""Vectors taken from rows to norms and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradclip.scopes.norm_indices import (
    NOWHERE,
    NormIndices,
    present_norms,
    row_values,
    sums_by_norm,
)
from tests.support.engines import vector


def row_indices(*indices: list[int]) -> tuple[NormIndices, ...]:
    return tuple(NormIndices(torch.tensor(each, dtype=torch.int64), rows=True) for each in indices)


@given(
    st.lists(st.lists(st.integers(NOWHERE, 4), max_size=4), max_size=4),
    st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    st.randoms(use_true_random=False),
)
def test_sums_and_values_find_their_norms(indices, order, random):
    """Rows in no norm enter none, and get the other value."""
    norm_indices, flat = row_indices(*indices), [index for each in indices for index in each]
    sums = vector(*(random.random() for _ in flat))
    found = sums_by_norm(sums.clone(), order, norm_indices, 5)
    for norm in range(5):
        parts = [s for s, index in zip(sums.tolist(), flat, strict=True) if index == norm]
        needed = max(parts, default=0.0) if order == math.inf else math.fsum(parts)
        assert found[norm].item() == pytest.approx(needed, rel=1e-12)
    present = present_norms(norm_indices, 5, torch.device("cpu"))
    assert present.tolist() == [norm in flat for norm in range(5)]
    values = torch.arange(5, dtype=torch.float64)
    needed = [7.0 if index == NOWHERE else float(index) for index in flat]
    assert row_values(values, norm_indices, 7.0).tolist() == needed


def test_one_row_for_each_norm_in_order_is_the_very_tensor():
    """Not where there are more norms, or fewer rows."""
    values, norm_indices = vector(1, 4, 9), row_indices([0], [1, 2])
    assert row_values(values, norm_indices, 1.0) is values
    assert sums_by_norm(values, 2.0, norm_indices, 3) is values
    assert sums_by_norm(values, 2.0, norm_indices, 4).tolist() == [1.0, 4.0, 9.0, 0.0]
    assert row_values(vector(1, 2, 3, 4), norm_indices, 1.0).tolist() == [1.0, 2.0, 3.0]


def test_the_same_sums_give_the_same_bits():
    """They are added in the order of the rows."""
    sums, indices = torch.rand(1000, dtype=torch.float64), torch.randint(3, (1000,))
    norm_indices = (NormIndices(indices, rows=True),)
    first = sums_by_norm(sums.clone(), 1.0, norm_indices, 3)
    assert all(
        torch.equal(sums_by_norm(sums.clone(), 1.0, norm_indices, 3), first) for _ in "12345"
    )


def test_no_value_is_read():
    """Tensors of the device "meta" have none."""
    norm_indices = row_indices([0, NOWHERE], [2, 0])
    sums = torch.empty(4, dtype=torch.float64, device="meta")
    assert sums_by_norm(sums, 2.0, norm_indices, 3).shape == (3,)
    assert row_values(torch.empty(3, device="meta"), norm_indices, 1.0).shape == (4,)
    assert present_norms(norm_indices, 3, torch.device("meta")).shape == (3,)
