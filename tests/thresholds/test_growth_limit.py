from __future__ import annotations

import math

import pytest

from gradclip.errors import ArgumentError
from gradclip.thresholds import GrowthLimit


def oracle(factor):
    """Fira's limiter: no norm is more than so many times the last one as it was clipped."""

    def limits(norms):
        limit, expected = math.inf, []
        for norm in norms:
            expected.append(limit)
            if norm is not None and math.isfinite(norm) and norm > 0:
                limit = factor * min(norm, limit)
        return expected

    return limits


@pytest.mark.parametrize("factor", [1.01, 2.0, 0.9])
def test_it_is_a_multiple_of_the_last_clipped_norm(factor, agrees_per_label):
    agrees_per_label(lambda: GrowthLimit(factor), oracle(factor))


def test_a_norm_of_zero_does_not_hold_it_at_zero(driver):
    assert driver(GrowthLimit(2.0)).run([[3.0], [0.0], [9.0]]) == [[math.inf], [6.0], [6.0]]


@pytest.mark.parametrize("factor", [0, -1.0, math.inf, math.nan, "2"])
def test_a_factor_that_cannot_be_meant_is_refused(factor):
    with pytest.raises(ArgumentError, match="factor is .*: give a finite number > 0"):
        GrowthLimit(factor)
