from __future__ import annotations

import math
import statistics

import pytest

from gradclip.thresholds import MeanDeviation, MedianDeviation


def oracle(factor, window, warmup):
    def limits(norms):
        past, expected = [], []
        for norm in norms:
            limit, last = math.inf, past[-window:]
            if len(past) + 1 >= max(warmup, 3):
                median = statistics.median(last)
                deviation = statistics.median(abs(each - median) for each in last)
                limit = median + factor * deviation if median > 0 else math.inf
            expected.append(limit)
            if norm is not None and math.isfinite(norm):
                past.append(norm)
        return expected

    return limits


@pytest.mark.parametrize(
    ("factor", "window", "warmup"), [(1.0, 2, 0), (6.0, 5, 3), (1.5, 6, 20), (3.0, 100, 4)]
)
def test_it_is_median_and_deviation_of_the_last_norms(factor, window, warmup, agrees_per_label):
    agrees_per_label(
        lambda: MedianDeviation(factor, window, warmup), oracle(factor, window, warmup)
    )


def test_a_spike_does_not_blind_it_as_it_does_a_mean(driver):
    norms = [[1.0 + step % 10 / 10] for step in range(120)]
    for rule, catches_second in ((MedianDeviation(), True), (MeanDeviation(), False)):
        run = driver(rule)
        run.run(norms)
        [[first]] = run.run([[100.0]])
        run.run(norms[:5])
        [[second]] = run.run([[50.0]])
        assert first < 100
        assert (second < 50) == catches_second


def test_a_level_that_rises_for_good_is_followed(driver):
    run = driver(MedianDeviation(window=20))
    limits = run.run([[1.0 + step % 3 / 10] for step in range(40)] + [[5.0]] * 12)
    assert limits[40][0] < 5
    assert limits[-1][0] >= 5


def test_a_distance_larger_than_that_of_a_free_place_keeps_its_rank(driver):
    run = driver(MedianDeviation(1.0, window=10, warmup=3))
    run.run([[0.0], [1.2e308], [1.2e308], [0.0], [0.0]])
    assert run.run([[1.0]]) == [[math.inf]]  # a median of 0 sets no limit
    run.run([[1.2e308]] * 3)  # now the median is 1.2e308 and three of eight are that far away
    assert run.run([[1.0]])[0][0] == pytest.approx(1.2e308)


def test_norms_of_skipped_steps_are_observed():
    assert MedianDeviation.observes_skipped
