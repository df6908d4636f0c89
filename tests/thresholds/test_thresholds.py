from __future__ import annotations

import math

import pytest
import torch

from gradclip import thresholds
from gradclip.errors import ArgumentError, NotAvailableError, StateError
from gradclip.thresholds import Fixed, Schedule, StepContext, Threshold, threshold_from

RULES = [Fixed(2.0), Fixed(0), Fixed(None), Schedule(lambda step: 1.0 + step)]


def context(step: int, labels: int) -> StepContext:
    return StepContext(step, torch.ones(labels, dtype=torch.bool))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_threshold_gives_one_limit_per_norm(rule, labels, dtype):
    norms = torch.arange(labels, dtype=dtype)
    rule.start([str(i) for i in range(labels)], norms.device, dtype)
    limits = rule.thresholds(norms, context(0, labels))
    assert limits.shape == norms.shape
    assert limits.dtype == dtype
    assert bool((limits >= 0).all())
    rule.observe(norms, norms, context(0, labels))
    rule.load_state_dict(rule.state_dict())


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_norm_that_is_not_finite_does_not_reach_a_rule_without_state(rule):
    limits = rule.thresholds(torch.tensor([math.nan], dtype=torch.float64), context(3, 1))
    assert not limits.isnan().any()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_state_of_another_threshold_is_refused(rule):
    with pytest.raises(StateError, match=r"keeps no state, found the keys \['history'\]"):
        rule.load_state_dict({"history": torch.zeros(3)})


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


def test_a_threshold_of_ones_own_is_taken_as_it_is():
    class Half(Threshold):
        def thresholds(self, norms, context):
            return norms / 2

    rule = Half()
    assert threshold_from(rule) is rule


@pytest.mark.parametrize("name", ["Percentile", "ZScore", "MedianDeviation"])
def test_rules_to_come_say_that_they_are_not_available(name):
    with pytest.raises(NotAvailableError, match=f"{name} is not available in this version"):
        getattr(thresholds, name)
    with pytest.raises(AttributeError):
        _ = thresholds.Percentil
