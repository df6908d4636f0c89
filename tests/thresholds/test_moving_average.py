from __future__ import annotations

import math

import pytest

from gradclip.errors import ArgumentError
from gradclip.thresholds import MovingAverage


def oracle(factor=1.05, decay=0.98, warmup=100, warmup_norm=1.0, order=2.0):
    """AdaGC: clipped together to a fixed norm first, then each by its own average."""

    def limits(steps):
        count = len(steps[0])
        average, seen, expected = [None] * count, [0] * count, []
        for step in steps:
            usable = [norm for norm in step if norm is not None and math.isfinite(norm)]
            total = max(usable, default=0.0)
            if order < math.inf:
                total = sum(norm**order for norm in usable) ** (1 / order)
            row = []
            for label, norm in enumerate(step):
                if norm is None or not math.isfinite(norm):
                    row.append(None)
                    continue
                limit = math.inf
                if seen[label] >= warmup:
                    limit = factor * average[label]
                elif total > warmup_norm:
                    limit = norm / total * warmup_norm
                row.append(limit)
                after = min(norm, limit)
                if after == 0:
                    continue
                if seen[label] == 0:
                    average[label] = after
                elif seen[label] < warmup:
                    average[label] = min(average[label], after)
                else:
                    average[label] = decay * average[label] + (1 - decay) * after
                seen[label] += 1
            expected.append(row)
        return expected

    return limits


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"warmup": 5, "warmup_norm": 2.0},
        {"factor": 1.5, "decay": 0.5, "warmup": 1, "warmup_norm": 1e9},
        {"factor": 0.9, "decay": 0.0, "warmup": 3},
    ],
    ids=str,
)
def test_it_is_the_limit_of_the_paper(arguments, agrees):
    agrees(lambda: MovingAverage(**arguments), oracle(**arguments))


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, math.inf])
def test_the_warm_up_takes_the_norm_of_all_in_the_order_of_the_norms(order, driver):
    steps = [[3.0, 4.0, 0.0], [1.0, 2.0, 2.0], [0.1, 0.2, 0.1], [5.0, math.nan, 7.0]]
    found = driver(MovingAverage(warmup=9), 3, order=order).run(steps)
    for limits, needed in zip(found, oracle(warmup=9, order=order)(steps), strict=True):
        for limit, value in zip(limits, needed, strict=True):
            assert limit == (math.inf if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.parametrize("norm", [1e-300, 1e200, 1.7e308])
def test_the_warm_up_clips_norms_whose_squares_leave_the_range(norm, driver):
    [limits] = driver(MovingAverage(warmup_norm=1e-301), 3).run([[norm] * 3])
    assert limits == [pytest.approx(1e-301 / math.sqrt(3), rel=1e-12)] * 3


def test_norms_of_zero_do_not_erase_a_label(driver):
    run = driver(MovingAverage(warmup=2))
    assert run.run([[0.0], [0.5], [0.0], [0.5], [0.0], [9.0]])[-1] == [pytest.approx(0.525)]


@pytest.mark.parametrize("count", [1, 2])
def test_norms_that_were_clipped_to_zero_are_not_observed(count, driver):
    run = driver(MovingAverage(cap=0.0), count)
    run.run([[3.0] * count] * 2)
    assert run.rule.state["counts"].tolist() == [0] * count


def test_a_label_without_gradients_keeps_its_average(driver):
    run = driver(MovingAverage(warmup=1, warmup_norm=100.0), 2)
    run.run([[2.0, 3.0]] + [[2.0, None]] * 500)
    assert run.run([[9.0, 9.0]])[0][1] == pytest.approx(1.05 * 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor is 0: give a finite number > 0"),
        ({"decay": 1.0}, "decay is 1.0: give a number >= 0 and < 1"),
        ({"warmup": 0}, "warmup is 0: give a whole number >= 1"),
        ({"warmup_norm": 0.0}, "warmup_norm is 0.0: give a finite number > 0"),
        ({"warmup_norm": math.inf}, "warmup_norm is inf: give a finite number > 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        MovingAverage(**arguments)
