from __future__ import annotations

import math

import torch
from torch import nn

from gradclip.scopes.naming import describe_nonfinite, named_parameters


def named(optimizers, model=None) -> list[str]:
    return [each.name for each in named_parameters(optimizers, model)]


def test_names_come_from_the_model_then_the_optimizer_then_the_place():
    model = nn.Linear(2, 1)
    outside = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [outside]}])
    assert named([optimizer]) == [
        "group 0, parameter 0",
        "group 0, parameter 1",
        "group 1, parameter 0",
    ]
    assert named([optimizer], model) == ["weight", "bias", "group 1, parameter 0"]
    given = torch.optim.SGD([("first", outside)])
    assert named([given]) == ["first"]


def test_a_parameter_in_two_places_is_named_once():
    weight = nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([weight]), torch.optim.SGD([weight])]
    assert named(optimizers) == ["optimizer 0, group 0, parameter 0"]


def test_no_two_parameters_have_the_same_name():
    model, other = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)
    optimizers = [
        torch.optim.SGD(model.parameters()),
        torch.optim.SGD(other.named_parameters()),
        torch.optim.SGD([("w", nn.Parameter(torch.ones(1)))]),
        torch.optim.SGD([("w", nn.Parameter(torch.ones(1)))]),
    ]
    assert named(optimizers, model) == [
        "weight",
        "bias",
        "optimizer 1, group 0, parameter 0",
        "w",
        "optimizer 3, group 0, parameter 0",
    ]


def described(**gradients: torch.Tensor) -> str:
    sums = [(g.coalesce() if g.is_sparse else g).pow(2).sum().item() for g in gradients.values()]
    return describe_nonfinite([*gradients], [*gradients.values()], sums)


def test_the_description_counts_elements_and_leaves_good_ones_out():
    bad, good = torch.tensor([1.0, math.nan, math.inf]), torch.tensor([1.0])
    assert described(a=bad, b=good) == "a (2 of 3 elements)"


def test_sparse_gradients_are_looked_into_as_they_add_up():
    one = torch.sparse_coo_tensor([[0, 2]], [1.0, math.nan], (3,))
    assert described(s=one) == "s (1 of 2 elements)"
    twice = torch.sparse_coo_tensor([[0, 2, 2]], [1.0, 3e38, 3e38], (3,))
    assert described(s=twice) == "s (1 of 2 elements)"


def test_a_long_list_is_cut():
    given = {f"p{i}": torch.tensor([math.nan]) for i in range(12)}
    assert described(**given).endswith("p9 (1 of 1 elements) and 2 more")


def test_a_sum_out_of_range_is_told_from_bad_elements():
    large = torch.tensor([1e200], dtype=torch.float64)
    assert described(a=large) == "a (the sum of its powers exceeds the range of float64)"
    assert described(a=torch.ones(1)).startswith("none by itself: the sum of their powers")
