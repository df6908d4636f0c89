"""Each rule against its paper, written down by hand for one label or several."""

import math
import statistics
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradclip import thresholds
from gradclip.errors import ArgumentError
from gradclip.thresholds import (
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    Quantile,
    StepContext,
    ZScore,
)
from tests.support.rules import Driver, agree, is_usable, per_label

DEFAULTS = {
    "Fixed(1)": "Fixed(1.0)",
    "Fixed(None)": "Fixed(None)",
    "Percentile()": "Percentile(10.0, window=1000)",
    "Percentile(factor=1.5)": "Percentile(10.0, window=1000, factor=1.5)",
    "Quantile(10)": "Quantile(10.0, rate=0.05)",
    "Quantile(factor=2, cap=9)": "Quantile(50.0, rate=0.05, factor=2.0, cap=9.0)",
    "ZScore(cap=1)": "ZScore(2.5, decay=0.97, warmup=25, eps=1e-06, cap=1.0)",
    "MovingAverage()": "MovingAverage(1.05, decay=0.98, warmup=100, warmup_norm=1.0)",
    "MeanDeviation()": "MeanDeviation(6.0, window=128, warmup=64)",
    "MedianDeviation()": "MedianDeviation(10.0, window=100, warmup=50)",
    "MedianDeviation(window=31)": "MedianDeviation(10.0, window=31, warmup=15)",
    "RelativeToWeights()": "RelativeToWeights(0.01, eps=0.001)",
    "GrowthLimit(floor=0, cap=3)": "GrowthLimit(1.01, cap=3.0, floor=0.0)",
}


@pytest.mark.parametrize("call", DEFAULTS)
def test_the_defaults_are_those_of_the_sources(call):
    """And the repr is the call that makes the rule, cap and floor only where they are given."""
    made, shown = eval(call, vars(thresholds)), DEFAULTS[call]
    assert repr(made) == repr(eval(shown, vars(thresholds))) == shown


# AutoClip: the percentile of the last norms, the current one included


def autoclip(percentile, window, factor=1.0):
    def limits(norms):
        past, expected = [], []
        for norm in norms:
            past += [norm] if is_usable(norm) else []
            last = past[-window:] if is_usable(norm) else past[-(window - 1) :]
            limit = float(np.percentile(last, percentile)) if last else math.inf
            expected.append(factor * limit)
        return expected

    return per_label(limits)


@pytest.mark.parametrize(
    ("percentile", "window"), [(0, 3), (5, 100), (10.0, 7), (50, 2), (73.21, 5), (100, 4)]
)
def test_percentile_is_autoclip(percentile, window):
    """With linear interpolation, as numpy has it."""
    agree(lambda: Percentile(percentile, window), autoclip(percentile, window))


@pytest.mark.parametrize("factor", [0.3, 1.5])
def test_a_factor_multiplies_the_percentile(factor):
    """With a window that fills and one that does not; without any norm there is still no limit."""
    for window in (4, 100):
        make = partial(Percentile, 30, window, factor=factor)
        agree(make, autoclip(30, window, factor))


# Andrew and others: a quantile that is tracked with one number


def adaptive_clipping(percentile, rate, factor=1.0):
    """Multiply by exp(-rate (below - quantile)), where below is 1 or 0: one norm a round."""

    def limits(norms):
        level, expected = None, []
        for norm in norms:
            expected.append(math.inf if level is None else factor * level)
            if is_usable(norm) and norm > 0:
                below = level is not None and norm <= level
                change = math.exp(-rate * (below - percentile / 100))
                level = norm if level is None else level * change
        return expected

    return per_label(limits)


@pytest.mark.parametrize(
    ("percentile", "rate", "factor"),
    [(50, 0.05, 1.0), (10, 0.2, 1.5), (90, 1.0, 0.5), (0, 0.1, 1.0), (100, 0.3, 3.0)],
)
def test_quantile_is_adaptive_clipping(percentile, rate, factor):
    """The first norm that is not 0 is the level, and no later one moves it by more than exp(rate).

    A factor leaves the level alone: norms are compared with the level, not with the threshold.
    """
    make = partial(Quantile, percentile, rate, factor=factor)
    agree(make, adaptive_clipping(percentile, rate, factor))


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=60),
    st.floats(0, 100),
    st.floats(0.01, 1.0),
)
def test_the_share_below_a_quantile_differs_from_it_by_what_the_level_moved(norms, p, rate):
    """Exactly, whatever the norms are: hence over many steps the share is the quantile."""
    run = Driver(Quantile(p, rate))
    levels = [limit for [limit] in run.run([[norm] for norm in norms])]
    below = sum(norm <= level for norm, level in zip(norms[1:], levels[1:], strict=True))
    moved = math.log(run.rule.state["level"].item() / norms[0])
    assert below - (len(norms) - 1) * p / 100 == pytest.approx(-moved / rate, abs=1e-9)


@pytest.mark.parametrize("percentile", [10, 50, 90])
@pytest.mark.parametrize("start", [0.01, 1.0, 100.0])
def test_a_quantile_becomes_the_percentile_of_a_window(percentile, start):
    """On norms that neither rise nor fall, wherever the first norm was."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(6000, generator=generator).mul(0.3).exp().tolist()
    rules = Quantile(percentile, 0.02), Percentile(percentile, 1000)
    found, window = (Driver(rule).run([[start], *([n] for n in norms)]) for rule in rules)
    levels, exact = np.array(found)[4000:, 0], np.array(window)[4000:, 0]
    assert np.median(levels / exact) == pytest.approx(1, abs=0.03)
    assert abs(np.log(levels / exact)).max() < 0.25


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("norm", [5e-324, 1e-310, 1.7e308])
def test_a_quantile_of_extreme_norms_can_be_left_again(count, norm):
    """A level of 0 or infinity, or one that is rounded to itself, would stay forever."""
    run = Driver(Quantile(50, rate=1.0), count)
    run.run([[norm] * count] * 50 + [[1.0] * count] * 1500)
    [limit] = {*run.ask([1.0] * count).tolist()}
    assert math.exp(-0.5) <= limit <= math.exp(0.5)


@pytest.mark.parametrize(("norm", "later"), [(5e-324, 1.0), (1.7e308, 1.0), (1.0, 5e-324)])
def test_a_slow_quantile_moves_at_every_step(norm, later):
    """Denormal levels would be rounded to themselves."""
    limits = [limit for [limit] in Driver(Quantile(50, 1e-3)).run([[norm], *[[later]] * 50])[1:]]
    assert len({*limits}) == 50
    assert limits == sorted(limits, reverse=norm > later)


@pytest.mark.parametrize("count", [1, 2])
def test_norms_of_0_leave_a_quantile_as_it_is(count):
    """A unit that is idle in most steps keeps its level, where a percentile would be 0."""
    run = Driver(Quantile(10), count)
    idle = [[0.0] * count, [1.0] * count, *[[0.0] * count] * 400]
    assert run.run(idle)[-1] == [1.0] * count


# ZClip: a list of the warm-up's norms, then moving averages


def zclip(z, decay, warmup, eps, cap):
    def limits(norms):
        first, mean, variance, expected = [], None, None, []
        for norm in norms:
            limit, usable = math.inf, is_usable(norm)
            if usable and mean is not None and mean > 0:
                score = (norm - mean) / (math.sqrt(variance) + eps)
                if score > z:
                    limit = mean + z * z * math.sqrt(variance) / score
            expected.append(min(limit, cap or math.inf) if usable else None)
            if usable and mean is None:
                first.append(norm)
                if len(first) == warmup:
                    mean, variance = statistics.fmean(first), statistics.pvariance(first)
            elif usable:
                clipped = min(norm, limit)
                mean = decay * mean + (1 - decay) * clipped
                variance = decay * variance + (1 - decay) * (clipped - mean) ** 2
        return expected

    return per_label(limits)


@pytest.mark.parametrize(
    ("z", "decay", "warmup", "eps", "cap"),
    [
        *((2.5, 0.97, 25, 1e-6, None), (1.5, 0.9, 3, 1e-6, None)),
        *((0.5, 0.5, 1, 0.1, None), (2.0, 0.97, 5, 1e-6, 1.5)),
    ],
)
def test_zscore_is_zclip(z, decay, warmup, eps, cap):
    """The averages observe the limit before the cap."""
    agree(lambda: ZScore(z, decay, warmup, eps, cap=cap), zclip(z, decay, warmup, eps, cap))


@pytest.mark.parametrize("count", [1, 2])
def test_zscore_limits_what_is_more_than_z_deviations_out(count):
    """Not what is just as many."""
    run = Driver(ZScore(z=1.0, warmup=2, eps=1.0), count)
    run.run([[1.0] * count, [3.0] * count])  # the mean is 2, the deviation 1
    assert run.ask([4.0] * count).tolist() == [math.inf] * count
    assert run.ask([6.0] * count).tolist() == [2.5] * count


def test_zscore_keeps_its_limits_after_extreme_norms():
    """Neither zeros nor a norm whose square overflows end them."""
    assert Driver(ZScore(warmup=3)).run([[0.0]] * 4 + [[5.0]])[-1] == [math.inf]
    run = Driver(ZScore(warmup=2, decay=0.5))
    run.run([[1e200], [3e200]] + [[1.0]] * 1100)
    assert run.run([[1e200]])[0][0] < 1e3


# AdaGC: clipped together to a fixed norm first, then each by its own average


def adagc(factor=1.05, decay=0.98, warmup=100, warmup_norm=1.0, order=2.0):
    def limits(steps):
        averages, counts, expected = [0.0] * len(steps[0]), [0] * len(steps[0]), []
        for step in steps:
            usable = [norm for norm in step if is_usable(norm)]
            total = max(usable, default=0.0)
            if order < math.inf:
                total = sum(norm**order for norm in usable) ** (1 / order)
            row = []
            for label, norm in enumerate(step):
                limit = None
                if is_usable(norm):
                    shared = norm / total * warmup_norm if total > warmup_norm else math.inf
                    warm, average = counts[label] < warmup, averages[label]
                    limit = shared if warm else factor * average
                    clipped = min(norm, limit)
                    if clipped > 0:
                        smallest = min(average, clipped) if counts[label] else clipped
                        moved = decay * average + (1 - decay) * clipped
                        averages[label] = smallest if warm else moved
                        counts[label] += 1
                row.append(limit)
            expected.append(row)
        return expected

    return limits


@pytest.mark.parametrize("arguments", [(), (1.05, 0.98, 5, 2.0), (1.5, 0.5, 1, 1e9), (0.9, 0.0, 3)])
def test_moving_average_is_adagc(arguments):
    """A norm of 0 never enters an average: it would erase its label forever."""
    agree(lambda: MovingAverage(*arguments), adagc(*arguments))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, math.inf])
def test_the_warm_up_takes_the_norm_of_all_in_the_order_of_the_norms(order):
    """A norm that is not finite has no limit and does not count."""
    steps = [[3.0, 4.0, 0.0], [1.0, 2.0, 2.0], [0.1, 0.2, 0.1], [5.0, math.nan, 7.0]]
    run = Driver(MovingAverage(warmup=9), 3, order=order)
    for limits, needed in zip(run.run(steps), adagc(warmup=9, order=order)(steps), strict=True):
        for limit, value in zip(limits, needed, strict=True):
            assert limit == (math.inf if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.parametrize("norm", [1e-300, 1e200, 1.7e308])
def test_the_warm_up_clips_norms_whose_squares_leave_the_range(norm):
    """Powers are taken relative to the largest norm."""
    [limits] = Driver(MovingAverage(warmup_norm=1e-301), 3).run([[norm] * 3])
    assert limits == [pytest.approx(1e-301 / math.sqrt(3), rel=1e-12)] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_norms_that_were_clipped_to_zero_are_not_observed(count):
    """Whatever they were as measured."""
    run = Driver(MovingAverage(cap=0.0), count)
    run.run([[3.0] * count] * 2)
    assert run.rule.state["counts"].tolist() == [0] * count


# OLMo's rule, and the same with medians: the last norms, without the current one


def of_last_norms(centre_and_deviation):
    def oracle(factor, window, warmup):
        def limits(norms):
            past, expected = [], []
            for norm in norms:
                limit = math.inf
                if len(past) + 1 >= max(warmup, 3):
                    centre, deviation = centre_and_deviation(past[-window:])
                    limit = centre + factor * deviation
                expected.append(limit)
                past += [norm] if is_usable(norm) else []
            return expected

        return per_label(limits)

    return oracle


def median_and_distance(norms):
    median = statistics.median(norms)
    distance = statistics.median(abs(norm - median) for norm in norms)
    return median if median > 0 else math.inf, distance


OF_LAST_NORMS = {
    MeanDeviation: of_last_norms(lambda n: (statistics.fmean(n), statistics.stdev(n))),
    MedianDeviation: of_last_norms(median_and_distance),
}


@pytest.mark.parametrize("rule", OF_LAST_NORMS)
@pytest.mark.parametrize("arguments", [(1.0, 2, 0), (6.0, 5, 3), (1.5, 6, 20), (3.0, 100, 4)])
def test_deviations_are_those_of_the_last_norms(rule, arguments):
    """Mean and sample deviation, or median and median distance."""
    agree(lambda: rule(*arguments), OF_LAST_NORMS[rule](*arguments))


def test_large_norms_that_hardly_differ_keep_their_deviation():
    """A sum of squares would lose it."""
    norms = [1e8 + step % 2 for step in range(1000)]
    for count in (1, 2):
        run = Driver(MeanDeviation(6.0, window=64), count)
        limit = run.run([[norm] * count for norm in norms])[-1][0]
        deviation = statistics.stdev(norms[-65:-1])
        assert limit - statistics.fmean(norms[-65:-1]) == pytest.approx(6 * deviation, rel=1e-6)


def test_a_distance_larger_than_that_of_a_free_slot_keeps_its_rank():
    """And a median of 0 sets no limit."""
    run = Driver(MedianDeviation(1.0, window=10, warmup=3))
    run.run([[0.0], [1.2e308], [1.2e308], [0.0], [0.0]])
    assert run.run([[1.0]]) == [[math.inf]]
    run.run([[1.2e308]] * 3)  # now the median is 1.2e308 and three of eight are that far away
    assert run.run([[1.0]])[0][0] == pytest.approx(1.2e308)


# Fira's limiter, and AGC


def fira(factor):
    def limits(norms):
        limit, expected = math.inf, []
        for norm in norms:
            expected.append(limit)
            if is_usable(norm) and norm > 0:
                limit = factor * min(norm, limit)
        return expected

    return per_label(limits)


@pytest.mark.parametrize("factor", [1.01, 2.0, 0.9])
def test_growth_limit_is_fira(factor):
    """A multiple of the last clipped norm that was not 0."""
    agree(lambda: thresholds.GrowthLimit(factor), fira(factor))


@pytest.mark.parametrize(("factor", "eps"), [(0.01, 1e-3), (0.5, 2.0)])
def test_relative_to_weights_is_agc(factor, eps):
    """A share of the weights' norm, which is at least eps."""
    weights = torch.tensor([0.0, 1e-5, 1.0, 2.0, 300.0], dtype=torch.float64)
    context = StepContext(0, torch.ones(5, dtype=torch.bool), 2.0, weights)
    limits = thresholds.RelativeToWeights(factor, eps).thresholds(torch.ones_like(weights), context)
    assert limits.tolist() == [factor * max(weight, eps) for weight in weights.tolist()]


def test_relative_to_weights_asks_for_weight_norms_and_misses_them():
    """The error is for those who call a rule by themselves."""
    assert thresholds.RelativeToWeights.needs_weights
    context = StepContext(0, torch.ones(1, dtype=torch.bool))
    said = "RelativeToWeights got a step without weight norms: the caller has to measure them for "
    said += r"a rule with needs_weights, as GradientClipper does\."
    with pytest.raises(ArgumentError, match=f"^{said}$"):
        thresholds.RelativeToWeights().thresholds(torch.ones(1), context)
