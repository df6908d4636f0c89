"""The formula, and norms that are NaN or infinite."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gradclip.gradients.coefficients import (
    are_finite,
    clip_coefficients,
    has_skip_reason,
    ones_if_skipped,
    reduction_of,
)
from tests.support.engines import vector

INF, NAN = math.inf, math.nan
sizes = st.floats(min_value=0, allow_infinity=False)


@given(norms=st.lists(sizes, min_size=1, max_size=4), threshold=sizes)
@example(norms=[0.0, 5e-324], threshold=0.0)
def test_a_coefficient_is_threshold_over_norm_and_at_most_one(norms, threshold):
    """One number serves all norms; norm and threshold of 0 give 1."""
    for thresholds in (torch.full_like(vector(*norms), threshold), threshold):
        found = clip_coefficients(vector(*norms), thresholds, erase=True).tolist()
        assert found == [1.0 if norm <= threshold else threshold / norm for norm in norms]


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("threshold", [0.0, 1.0, INF])
@pytest.mark.parametrize(("erase", "needed"), [(True, 0.0), (False, 1.0)])
@pytest.mark.parametrize("others", [[], [5.0]])
def test_a_norm_that_is_not_finite_erases_or_leaves(bad, threshold, erase, needed, others):
    norms = vector(bad, *others)
    found = clip_coefficients(norms, torch.full_like(norms, threshold), erase=erase)
    assert found.tolist() == [needed, *(min(1.0, threshold / 5) for _ in others)]
    assert not are_finite(norms)
    assert not are_finite(vector(*others, bad))
    assert are_finite(vector(0, 5))
    assert are_finite(vector(1e308))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norms", [[1.0], [4.0], [1.0, 4.0]])
def test_coefficients_have_device_and_dtype_of_the_norms(norms, dtype):
    """Whatever the default device is; nothing is read on another device."""
    norms = torch.tensor(norms, dtype=dtype)
    with torch.device("meta"):
        found = clip_coefficients(norms, torch.full_like(norms, 2.0), erase=True)
        assert torch.equal(clip_coefficients(norms, 2.0, erase=True), found)
    assert (found.device, found.dtype, found.shape) == (norms.device, dtype, norms.shape)
    assert clip_coefficients(norms.to("meta"), 1.0, erase=True).shape == norms.shape


@pytest.mark.parametrize(
    ("norms", "nonfinite", "exceeding", "skips"),
    [
        ((1.0, 2.0), True, True, False),
        ((1.0, 2.1), True, False, False),
        ((1.0, 2.1), False, True, True),
        ((NAN, 2.0), False, True, False),
        ((INF, 2.0), False, True, False),
        ((NAN, 2.0), True, False, True),
        ((1.0, INF), True, True, True),
    ],
)
def test_a_step_is_skipped_for_the_reasons_asked_for(norms, nonfinite, exceeding, skips):
    found = has_skip_reason(
        torch.tensor(norms), torch.tensor([1.0, 2.0]), nonfinite=nonfinite, exceeding=exceeding
    )
    assert (found.shape, found.dtype, found.item()) == ((), torch.bool, skips)


@pytest.mark.parametrize("kind", [bool, torch.tensor])
def test_a_skipped_step_has_the_coefficient_one(kind):
    coefficients = torch.tensor([0.0, 0.5])
    assert ones_if_skipped(kind(True), coefficients).tolist() == [1.0, 1.0]
    assert ones_if_skipped(kind(False), coefficients).tolist() == [0.0, 0.5]


def test_bound_and_coefficient_reduce_a_norm_together():
    norms, bounded = vector(4.0, 0.0, INF, 4.0, 0.5), vector(2.0, 0.0, INF, 4.0, 0.25)
    coefficients = vector(0.5, 1.0, 0.0, 0.5, 1.0)
    assert reduction_of(coefficients, bounded, norms).tolist() == [0.25, 1.0, 0.0, 0.5, 0.5]
    assert reduction_of(coefficients, norms, norms) is coefficients
