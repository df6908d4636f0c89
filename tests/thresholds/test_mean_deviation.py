from __future__ import annotations

import math
import statistics

import pytest

from gradclip.thresholds import MeanDeviation


def oracle(factor, window, warmup):
    """OLMo-core's rule: mean and sample deviation of the last norms, without the current one."""

    def limits(norms):
        past, expected = [], []
        for norm in norms:
            last = past[-window:]
            active = len(past) + 1 >= max(warmup, 3)
            limit = statistics.fmean(last) + factor * statistics.stdev(last) if active else math.inf
            expected.append(limit)
            if norm is not None and math.isfinite(norm):
                past.append(norm)
        return expected

    return limits


@pytest.mark.parametrize(
    ("factor", "window", "warmup"), [(1.0, 2, 0), (6.0, 5, 3), (1.5, 6, 20), (3.0, 100, 4)]
)
def test_it_is_mean_and_deviation_of_the_last_norms(factor, window, warmup, agrees_per_label):
    agrees_per_label(lambda: MeanDeviation(factor, window, warmup), oracle(factor, window, warmup))


def test_it_begins_at_half_the_window(driver):
    limits = driver(MeanDeviation()).run([[1.0 + step % 2] for step in range(70)])
    assert [limit == math.inf for [limit] in limits] == [True] * 63 + [False] * 7


def test_large_norms_that_hardly_differ_keep_their_deviation(driver):
    norms = [1e8 + step % 2 for step in range(1000)]
    [limit] = driver(MeanDeviation(6.0, window=64)).run([[norm] for norm in norms])[-1]
    deviation = statistics.stdev(norms[-65:-1])
    assert limit - statistics.fmean(norms[-65:-1]) == pytest.approx(6 * deviation, rel=1e-6)


def test_norms_of_skipped_steps_are_observed():
    assert MeanDeviation.observes_skipped
