"""Names of parameters, in labels and in the error for norms that are not finite."""

import math

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, NonFiniteGradientError
from tests.support.reference import parameter_with

SGD = torch.optim.SGD
WEIGHT, TWIN = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
MODEL, OTHER = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)
POSITIONS = ["group 0, parameter 0", "group 0, parameter 1", "group 1, parameter 0"]
FOUR = [[*MODEL.parameters()], [*OTHER.named_parameters()], [("w", WEIGHT)], [("w", TWIN)]]
TAKEN = ["weight", "bias", f"optimizer 1, {POSITIONS[0]}", "w", f"optimizer 3, {POSITIONS[0]}"]
GROUPS = [{"params": [*MODEL.parameters()]}, {"params": [WEIGHT]}]


@pytest.mark.parametrize(
    ("make", "model", "names"),
    [
        (lambda: [SGD(GROUPS)], None, POSITIONS),
        (lambda: [SGD(GROUPS)], MODEL, ["weight", "bias", "group 1, parameter 0"]),
        (lambda: [SGD([("first", WEIGHT)])], None, ["first"]),
        (lambda: [SGD([WEIGHT]), SGD([WEIGHT])], None, ["optimizer 0, group 0, parameter 0"]),
        (lambda: [SGD(params) for params in FOUR], MODEL, TAKEN),
    ],
)
def test_no_two_parameters_have_the_same_name(make, model, names):
    """The model's, else the optimizer's unless it is taken, else the position."""
    with GradientClipper(make(), 1.0, scope="parameter", model=model) as clipper:
        assert [*clipper.labels] == names


LARGE = torch.tensor([1e200], dtype=torch.float64)
TWICE = torch.sparse_coo_tensor([[0, 2, 2]], [1.0, 3e38, 3e38], (3,))
MANY = ", ".join(f"p{index} (1 of 1 elements)" for index in range(10)) + " and 2 more"
RANGE = "exceeds the range of float64"


@pytest.mark.parametrize(
    ("gradients", "said"),
    [
        ({"a": torch.tensor([1.0, math.nan, math.inf]), "b": torch.ones(1)}, "a (2 of 3 elements)"),
        ({"s": torch.sparse_coo_tensor([[0, 2]], [1, math.nan], (3,))}, "s (1 of 2 elements)"),
        ({"s": TWICE}, "s (1 of 2 elements)"),
        ({f"p{index}": torch.tensor([math.nan]) for index in range(12)}, MANY),
        ({"a": LARGE}, f"a (the sum of its powers {RANGE})"),
        (dict.fromkeys("ab", LARGE * 1.2e-46), f"none by itself: the sum of their powers {RANGE}"),
    ],
)
def test_the_error_says_what_is_not_finite(gradients, said):
    """With elements counted; sparse gradients are read as they add up."""
    named = [(name, parameter_with(gradient.clone())) for name, gradient in gradients.items()]
    GradientClipper(optimizer := SGD(named), 1.0, nonfinite="raise")
    with pytest.raises(NonFiniteGradientError) as raised:
        optimizer.step()
    assert f": {said}" in str(raised.value)
