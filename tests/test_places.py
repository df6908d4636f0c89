from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradclip.scopes.norm_indices import (
    NOWHERE,
    NormIndices,
    gradient_indices,
    present_norms,
    row_values,
    sums_by_norm,
)

CPU = torch.device("cpu")


def places(*labels: list[int]) -> tuple[NormIndices, ...]:
    return tuple(NormIndices(torch.tensor(each, dtype=torch.int64), rows=True) for each in labels)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(
    st.lists(st.lists(st.integers(NOWHERE, 4), max_size=4), max_size=4),
    st.sampled_from([1.0, 2.0, 3.0, math.inf]),
    st.randoms(use_true_random=False),
)
def test_sums_and_values_find_their_labels(labels, order, random):
    where, flat = places(*labels), [label for each in labels for label in each]
    sums = double(*(random.random() for _ in flat))
    found = sums_by_norm(sums.clone(), order, where, 5)
    for label in range(5):
        mine = [s for s, of in zip(sums.tolist(), flat, strict=True) if of == label]
        needed = max(mine, default=0.0) if order == math.inf else math.fsum(mine)
        assert found[label].item() == pytest.approx(needed, rel=1e-12)
    assert present_norms(where, 5, CPU).tolist() == [label in flat for label in range(5)]
    values = torch.arange(5, dtype=torch.float64)
    needed = [7.0 if label == NOWHERE else float(label) for label in flat]
    assert row_values(values, where, 7.0).tolist() == needed


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("order", [2.0, math.inf])
def test_what_is_not_finite_stays_in_its_label(order, bad):
    found = sums_by_norm(double(1, bad, 4, bad), order, places([0, 1], [0, NOWHERE]), 3)
    assert math.isfinite(found[0].item())
    assert not math.isfinite(found[1].item())
    assert found[2].item() == 0.0


def test_one_sum_for_each_label_in_order_is_not_moved():
    values = double(1, 4, 9)
    assert row_values(values, places([0], [1, 2]), 1.0) is values
    assert sums_by_norm(values, 2.0, places([0], [1, 2]), 3) is values
    assert sums_by_norm(values, 2.0, places([0], [1, 2]), 4).tolist() == [1.0, 4.0, 9.0, 0.0]
    assert row_values(double(1, 2, 3, 4), places([0], [1, 2]), 1.0).tolist() == [1.0, 2.0, 3.0]


def test_sums_find_the_gradient_that_they_are_of():
    found = gradient_indices(places([3, 3], [NOWHERE, 2, 0], [1]))
    assert [place.indices.tolist() for place in found] == [[0, 0], [NOWHERE, 1, 1], [2]]
    assert sums_by_norm(double(1, 2, 4, 8, 16, 32), 2.0, found, 3).tolist() == [3.0, 24.0, 32.0]


def test_the_order_of_summation_is_that_of_the_places():
    torch.manual_seed(0)
    sums, labels = torch.rand(1000, dtype=torch.float64), torch.randint(3, (1000,))
    where = (NormIndices(labels, rows=True),)
    first = sums_by_norm(sums.clone(), 1.0, where, 3)
    assert all(torch.equal(sums_by_norm(sums.clone(), 1.0, where, 3), first) for _ in range(5))
    one_by_one = [0.0] * 3
    for value, label in zip(sums.tolist(), labels.tolist(), strict=True):
        one_by_one[label] += value
    assert first.tolist() == pytest.approx(one_by_one, rel=1e-13)


def test_no_value_is_needed_for_it():
    where = places([0, NOWHERE], [2, 0])
    sums = torch.empty(4, dtype=torch.float64, device="meta")
    assert sums_by_norm(sums, 2.0, where, 3).shape == (3,)
    assert row_values(torch.empty(3, device="meta"), where, 1.0).shape == (4,)
    assert present_norms(where, 3, torch.device("meta")).shape == (3,)
