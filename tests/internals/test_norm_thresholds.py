from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, ClipRecord, Threshold
from gradclip.gradients.norm_thresholds import NormThresholds
from gradclip.gradients.policies import Settings
from gradclip.gradients.step import StepGradients
from gradclip.scopes.labels import NormLabels
from gradclip.scopes.norm_indices import NormIndices
from gradclip.scopes.scope import Scope

CPU = torch.device("cpu")


class Rule(Threshold):
    """Allows half; keeps what it is told."""

    def __init__(self) -> None:
        self.started = None
        self.told = []

    def start(self, labels, device, dtype):
        self.started = (labels, device, dtype)

    def thresholds(self, norms, context):
        return norms / 2

    def observe(self, norms, clipped_norms, context):
        self.told.append((norms.tolist(), clipped_norms.tolist(), context.present.tolist()))


def labels(*keys) -> NormLabels:
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], **({} if key is ... else {"max_norm": key})}
        for key in keys
    ]
    return NormLabels([torch.optim.SGD(groups, lr=1.0)], Scope())


def gradients(count: int, partial: bool = False) -> StepGradients:
    tensors = [torch.ones(1) for _ in range(count)]
    norm_indices = [NormIndices(torch.tensor([index])) for index in range(count)]
    return StepGradients(tensors, norm_indices, Settings(), count, CPU, partial=partial)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def record(*norms: float, **options) -> ClipRecord:
    found = double(*norms)
    return ClipRecord(0, 0.0, found, found / 2, torch.full_like(found, 0.5), **options)


def test_a_threshold_starts_with_the_label_that_it_rules():
    rule = Rule()
    NormThresholds(rule, labels(1.0, ...), CPU, 2.0)
    assert rule.started == (("global",), CPU, torch.float64)


def test_thresholds_of_groups_stand_in_the_order_of_the_labels():
    limits = NormThresholds(Rule(), labels(1.0, ..., 0.25), CPU, 2.0)
    assert limits.at_step(gradients(3), double(8, 6, 4), 0).tolist() == [1.0, 3.0, 0.25]


def test_what_was_allowed_is_told_with_what_came_of_it():
    rule = Rule()
    limits = NormThresholds(rule, labels(1.0, ...), CPU, 2.0)
    limits.at_step(gradients(2), double(8, 6), 0)
    limits.observe(record(8, 6))
    assert rule.told == [([6.0], [3.0], [True])]


@pytest.mark.parametrize("skipped", [True, torch.tensor(True)])
def test_a_rule_that_asks_is_told_of_a_skipped_step_what_scaling_would_have_made(skipped):
    rule = Rule()
    rule.observes_skipped = True
    limits = NormThresholds(rule, labels(...), CPU, 2.0)
    limits.at_step(gradients(1), double(8), 0)
    found = replace(record(8, skipped=skipped), coefficients=double(1))
    limits.observe(found)
    assert rule.told == [([8.0], [4.0], [True])]


def test_a_skipped_step_and_a_norm_of_a_part_are_not_told():
    rule = Rule()
    limits = NormThresholds(rule, labels(...), CPU, 2.0)
    limits.at_step(gradients(1), double(8), 0)
    limits.observe(record(8, skipped=True))
    limits.at_step(gradients(1, partial=True), double(8), 0)
    limits.observe(record(8))
    assert rule.told == []


@pytest.mark.parametrize("name", ["skipped", "overflow"])
@pytest.mark.parametrize("value", [True, False])
def test_what_only_the_device_knows_is_told_as_absent(name, value):
    rule = Rule()
    limits = NormThresholds(rule, labels(...), CPU, 2.0)
    limits.at_step(gradients(1), double(8), 0)
    limits.observe(replace(record(8), **{name: torch.tensor(value)}))
    assert rule.told == [([8.0], [4.0], [not value])]


@pytest.mark.parametrize("returned", [double(1, 2), torch.tensor(1.0), double()])
def test_another_shape_is_an_error(returned):
    class Wrong(Rule):
        def thresholds(self, norms, context):
            return returned

    limits = NormThresholds(Wrong(), labels(...), CPU, 2.0)
    with pytest.raises(ArgumentError, match=r"Wrong.thresholds\(\) returned the shape .*\(1,\)"):
        limits.at_step(gradients(1), double(8), 0)


def test_without_a_limit_of_its_own_a_label_has_that_of_the_rule():
    limits = NormThresholds(Rule(), labels(..., None), CPU, 2.0)
    assert limits.at_step(gradients(1), double(math.inf), 0).tolist() == [math.inf]


@pytest.mark.parametrize(
    "returned",
    [double(math.nan), double(-1), 1.0, None, [1.0], torch.tensor([1]), torch.tensor([True])],
)
def test_what_is_no_limit_is_an_error(returned):
    class Wrong(Rule):
        def thresholds(self, norms, context):
            return returned

    limits = NormThresholds(Wrong(), labels(...), CPU, 2.0)
    with pytest.raises(ArgumentError, match=r"Wrong.thresholds\(\) returned .*: return "):
        limits.at_step(gradients(1), double(8), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_thresholds_of_another_precision_are_converted(dtype):
    class Narrow(Rule):
        def thresholds(self, norms, context):
            return (norms / 2).to(dtype)

    found = NormThresholds(Narrow(), labels(...), CPU, 2.0).at_step(gradients(1), double(8), 0)
    assert found.dtype == torch.float64
    assert found.tolist() == [4.0]


def test_where_the_norm_is_not_finite_a_threshold_may_be_nan():
    limits = NormThresholds(Rule(), labels(...), CPU, 2.0)
    assert math.isnan(limits.at_step(gradients(1), double(math.nan), 0).item())


def test_what_a_rule_of_ones_own_writes_to_is_its_own():
    class Careless(Rule):
        def thresholds(self, norms, context):
            context.present.zero_()
            return norms.mul_(0.5)

        def observe(self, norms, clipped_norms, context):
            super().observe(norms, clipped_norms, context)
            context.present.zero_()
            norms.zero_()

    rule, norms, found = Careless(), double(8), record(8)
    limits = NormThresholds(rule, labels(...), CPU, 2.0)
    for _ in range(2):
        assert limits.at_step(gradients(1), norms, 0).tolist() == [4.0]
        limits.observe(found)
    assert norms.tolist() == [8.0]
    assert found.norms.tolist() == [8.0]
    assert rule.told == [([8.0], [4.0], [True])] * 2
