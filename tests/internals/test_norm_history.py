"""The line above which a norm is a spike, against its definition."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradclip.records.norm_history import DEVIATIONS, FEWEST, WINDOW, NormHistory

NAN, INF = math.nan, math.inf
LEVELS = st.integers(1, 12).map(float) | st.floats(0.01, 100.0)


def history(*norms):
    made = NormHistory()
    for norm in norms:
        made.add(norm)
    return made


@given(st.lists(LEVELS, min_size=FEWEST, max_size=2 * WINDOW), st.floats(0.5, 3.0))
def test_spike_is_above_the_median_and_ten_median_deviations(norms, factor):
    found, recent = history(*norms), norms[-WINDOW:]
    median = statistics.median(recent)
    line = median + DEVIATIONS * statistics.median(abs(norm - median) for norm in recent)
    assert found.median == median
    assert found.median + DEVIATIONS * found.deviation() == pytest.approx(line, rel=1e-12)
    for norm in (line * factor, *norms[:20]):
        if abs(norm - line) > 1e-5 * line:
            assert found.is_spike(norm) == (norm > line)


USUAL = [*map(float, range(1, 101))]  # the line is 50.5 + 10 * 25
CASES = {
    "on the line": (USUAL, 300.5, False),
    "too few norms": ([1.0] * (FEWEST - 1), 1e9, False),
    "enough norms": ([1.0] * FEWEST, 1e9, True),
    "zeros and non-finite norms do not count": ([0.0, 2.0, NAN, 0.0, INF, 2.1] * 20, 2.5, False),
    "the others do": ([0.0, 2.0, NAN, 0.0, INF, 2.1] * 20, 2.7, True),
    "rounding of equal norms": ([5.0] * 50, 5.0 * (1 + 1e-9), False),
    "more than rounding": ([5.0] * 50, 5.01, True),
}


@pytest.mark.parametrize(("norms", "norm", "is_spike"), CASES.values(), ids=CASES)
def test_cases(norms, norm, is_spike):
    assert history(*norms).is_spike(norm) == is_spike


def test_text_shows_the_norms_just_before():
    assert str(history(1.0, 2.0, 3.0, NAN, 0.0, 123456.0)) == "2, 3, nan, 0, 1.235e+05"
    assert str(history()) == "not known"
