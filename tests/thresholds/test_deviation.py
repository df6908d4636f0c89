from __future__ import annotations

import math

import pytest

from gradclip.errors import ArgumentError
from gradclip.thresholds import MeanDeviation, MedianDeviation


@pytest.mark.parametrize("rule", [MeanDeviation, MedianDeviation])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": 0}, "factor is 0: give a finite number > 0"),
        ({"factor": math.inf}, "factor is inf: give a finite number > 0"),
        ({"window": 1}, "window is 1: give a whole number >= 2"),
        ({"window": 2.5}, "window is 2.5: give a whole number >= 2"),
        ({"warmup": -1}, "warmup is -1: give a whole number >= 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(rule, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        rule(**arguments)


@pytest.mark.parametrize("rule", [MeanDeviation, MedianDeviation])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
def test_no_limit_before_the_third_norm(rule, warmup, driver):
    limits = driver(rule(window=4, warmup=warmup)).run([[1.0], [1.0], [9.0]])
    assert limits == [[math.inf], [math.inf], [1.0]]


@pytest.mark.parametrize("rule", [MeanDeviation, MedianDeviation])
def test_the_warm_up_is_half_the_window_unless_it_is_given(rule):
    assert rule(window=31).warmup == 15
    assert rule(window=31, warmup=0).warmup == 0
