from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradclip.gradients.coefficients import (
    are_finite,
    clip_coefficients,
    has_skip_reason,
    ones_if_skipped,
    reduction_of,
)

sizes = st.floats(min_value=0, allow_infinity=False)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(norms=st.lists(sizes, min_size=1, max_size=4), threshold=sizes)
def test_a_coefficient_is_threshold_over_norm_and_never_above_one(norms, threshold):
    thresholds = torch.full((len(norms),), threshold, dtype=torch.float64)
    found = clip_coefficients(vector(*norms), thresholds, erase=True).tolist()
    assert found == [1.0 if norm <= threshold else threshold / norm for norm in norms]


@pytest.mark.parametrize("norms", [[4.0], [4.0, 2.0, 8.0]])
def test_one_number_is_the_threshold_of_all_norms(norms):
    found = clip_coefficients(vector(*norms), 2.0, erase=True)
    assert found.tolist() == [2.0 / norm for norm in norms]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.0, 1.0, math.inf])
@pytest.mark.parametrize(("erase", "needed"), [(True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("others", [[], [5.0]])
def test_a_norm_that_is_not_finite_is_erased_or_left(bad, threshold, erase, needed, others):
    norms = vector(bad, *others)
    found = clip_coefficients(norms, torch.full_like(norms, threshold), erase=erase)
    assert found[0].item() == needed
    assert [c.item() for c in found[1:]] == [min(1.0, threshold / 5) for _ in others]


@pytest.mark.parametrize("count", [1, 3])
def test_zero_norms_under_a_zero_threshold_are_left(count):
    zeros = torch.zeros(count, dtype=torch.float64)
    assert clip_coefficients(zeros, zeros, erase=True).tolist() == [1.0] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norms", [[1.0], [4.0], [1.0, 4.0]])
def test_coefficients_are_where_the_norms_are_and_of_their_dtype(norms, dtype):
    norms = torch.tensor(norms, dtype=dtype)
    with torch.device("meta"):
        found = clip_coefficients(norms, torch.full_like(norms, 2.0), erase=True)
    assert (found.device, found.dtype, found.shape) == (norms.device, dtype, norms.shape)


def test_off_the_cpu_nothing_is_read():
    norms = torch.empty(1, device="meta")
    assert clip_coefficients(norms, norms, erase=True).shape == (1,)


@pytest.mark.parametrize("others", [[], [5.0]])
@pytest.mark.parametrize(
    ("norm", "finite"), [(0.0, True), (1e308, True), (math.inf, False), (math.nan, False)]
)
def test_norms_are_finite_where_each_of_them_is(norm, finite, others):
    assert are_finite(vector(*others, norm)) is finite


@pytest.mark.parametrize(
    ("norms", "nonfinite", "exceeding", "skips"),
    [
        ((1.0, 2.0), True, True, False),
        ((1.0, 2.1), True, False, False),
        ((1.0, 2.1), False, True, True),
        ((math.nan, 2.0), False, True, False),
        ((math.inf, 2.0), False, True, False),
        ((math.nan, 2.0), True, False, True),
        ((1.0, math.inf), True, True, True),
    ],
)
def test_a_step_is_skipped_for_the_reasons_asked_for(norms, nonfinite, exceeding, skips):
    found = has_skip_reason(
        torch.tensor(norms), torch.tensor([1.0, 2.0]), nonfinite=nonfinite, exceeding=exceeding
    )
    assert found.shape == ()
    assert found.dtype == torch.bool
    assert found.item() is skips


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_skipped_step_has_the_coefficient_one(as_tensor):
    coefficients = torch.tensor([0.0, 0.5])
    for skipped, expected in ((True, [1.0, 1.0]), (False, [0.0, 0.5])):
        given = torch.tensor(skipped) if as_tensor else skipped
        assert ones_if_skipped(given, coefficients).tolist() == expected


def test_a_norm_is_reduced_by_the_bound_and_by_the_coefficient():
    norms = torch.tensor([4.0, 0.0, math.inf, 4.0, 0.5])
    bounded = torch.tensor([2.0, 0.0, math.inf, 4.0, 0.25])
    coefficients = torch.tensor([0.5, 1.0, 0.0, 0.5, 1.0])
    assert reduction_of(coefficients, bounded, norms).tolist() == [0.25, 1.0, 0.0, 0.5, 0.5]
    assert reduction_of(coefficients, norms, norms) is coefficients
