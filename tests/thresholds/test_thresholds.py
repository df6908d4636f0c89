from __future__ import annotations

import math

import pytest
import torch

from gradclip import thresholds
from gradclip.errors import ArgumentError
from gradclip.thresholds import Fixed, Schedule, StepContext, Threshold, threshold_from


def context(step: int, labels: int) -> StepContext:
    return StepContext(step, torch.ones(labels, dtype=torch.bool))


def test_none_means_no_limit():
    assert threshold_from(None).thresholds(torch.ones(1), context(0, 1)).item() == math.inf


def test_a_function_of_the_step_is_asked_once_a_step():
    asked = []

    def limit(step: int) -> float | None:
        asked.append(step)
        return None if step == 1 else 0.5

    rule = threshold_from(limit)
    limits = [rule.thresholds(torch.ones(1), context(step, 1)).item() for step in range(3)]
    assert limits == [0.5, math.inf, 0.5]
    assert asked == [0, 1, 2]


@pytest.mark.parametrize("returned", [-1.0, math.nan, math.inf, True, "1", torch.ones(2)])
def test_what_a_function_returns_is_checked(returned):
    rule = threshold_from(lambda step: returned)
    with pytest.raises(ArgumentError, match=r"max_norm\(7\) is "):
        rule.thresholds(torch.ones(1), context(7, 1))


def test_a_class_instead_of_an_instance_is_refused():
    with pytest.raises(ArgumentError, match=r"the class Fixed itself: give an instance, Fixed"):
        threshold_from(Fixed)


def test_a_rule_that_is_no_threshold_is_refused():
    class Half:
        def thresholds(self, norms, context):
            return norms / 2

        def __call__(self, step):
            return 1.0

    with pytest.raises(
        ArgumentError,
        match="^max_norm is a Half, which is not a Threshold: derive its class from "
        r"gradclip\.Threshold\.$",
    ):
        threshold_from(Half())


@pytest.mark.parametrize("function", [1.0, None, Fixed])
def test_a_schedule_of_no_function_is_refused(function):
    with pytest.raises(
        ArgumentError,
        match="^Schedule got .*: give a function of the step that returns a number >= 0, or None "
        r"for no limit\.$",
    ):
        Schedule(function)


def test_a_threshold_of_ones_own_is_taken_as_it_is():
    class Half(Threshold):
        def thresholds(self, norms, context):
            return norms / 2

    rule = Half()
    assert threshold_from(rule) is rule


def test_the_public_names_are_these():
    assert thresholds.__all__ == [
        "AdaptiveThreshold",
        "Fixed",
        "GrowthLimit",
        "MeanDeviation",
        "MedianDeviation",
        "MovingAverage",
        "Percentile",
        "RelativeToWeights",
        "Schedule",
        "StepContext",
        "Threshold",
        "ZScore",
        "threshold_from",
    ]


def test_a_fixed_threshold_is_made_once():
    rule = Fixed(2.0)
    limits = rule.thresholds(torch.ones(3), context(0, 3))
    assert rule.thresholds(torch.zeros(3), context(1, 3)) is limits


@pytest.mark.parametrize(
    "other",
    [torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(3, device="meta")],
    ids=["shape", "dtype", "device"],
)
def test_a_fixed_threshold_is_made_anew_for_other_norms(other):
    rule = Fixed(2.0)
    rule.thresholds(torch.ones(3), context(0, 3))
    limits = rule.thresholds(other, context(1, len(other)))
    assert (limits.shape, limits.dtype, limits.device) == (other.shape, other.dtype, other.device)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan, math.inf, True, "1.0", torch.ones(2)])
def test_a_fixed_threshold_that_cannot_be_meant_is_refused(max_norm):
    with pytest.raises(ArgumentError, match="^max_norm is .*: give "):
        Fixed(max_norm)
