from __future__ import annotations

import math

import pytest
import torch

from gradclip.errors import ArgumentError
from gradclip.thresholds import RelativeToWeights, StepContext


def limits(rule, weights):
    weights = torch.tensor(weights, dtype=torch.float64)
    present = torch.ones(len(weights), dtype=torch.bool)
    return rule.thresholds(torch.ones_like(weights), StepContext(0, present, 2.0, weights)).tolist()


@pytest.mark.parametrize(("factor", "eps"), [(0.01, 1e-3), (0.5, 2.0)])
def test_it_is_a_share_of_the_weights_norm(factor, eps):
    weights = [0.0, 1e-5, 1.0, 2.0, 300.0]
    expected = [factor * max(weight, eps) for weight in weights]
    assert limits(RelativeToWeights(factor, eps), weights) == expected


def test_weights_of_zero_can_leave_zero():
    assert limits(RelativeToWeights(), [0.0]) == [1e-5]


def test_it_asks_for_weight_norms_and_misses_them():
    assert RelativeToWeights.needs_weights
    context = StepContext(0, torch.ones(1, dtype=torch.bool))
    with pytest.raises(
        ArgumentError,
        match="^RelativeToWeights got a step without weight norms: the caller has to measure them "
        r"for a rule with needs_weights, as GradientClipper does\.$",
    ):
        RelativeToWeights().thresholds(torch.ones(1), context)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": -0.01}, "factor is -0.01: give a finite number > 0"),
        ({"eps": 0}, "eps is 0: give a finite number > 0"),
        ({"eps": math.nan}, "eps is nan: give a finite number > 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        RelativeToWeights(**arguments)
