"""Parameters and gradients given in each other's place, and iterators that yield nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradclip
from gradclip import GradientError

BY_PARAMETERS: list[Callable[[Any], Any]] = [
    lambda given: gradclip.clip_grad_norm_(given, 1.0),
    lambda given: gradclip.clip_grad_value_(given, 1.0),
    lambda given: gradclip.clip_grads_with_norm_(given, 1.0, torch.tensor(5.0)),
    lambda given: gradclip.clip_grad_units_(given),
]
BY_GRADIENTS: list[Callable[[Any], Any]] = [
    lambda given: gradclip.clip_gradients_(given, 1.0),
    lambda given: gradclip.clip_gradients(given, 1.0),
    lambda given: gradclip.get_total_norm(given),
]


def gradients(*, create_graph: bool = False) -> list[Tensor]:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    return [*torch.autograd.grad((weight**2).sum(), weight, create_graph=create_graph)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("call", BY_PARAMETERS)
@pytest.mark.parametrize(
    "given",
    [
        gradients(),
        gradients(create_graph=True),
        [nn.Parameter(torch.ones(2)), *gradients()],
        nn.Linear(2, 2).state_dict().values(),
        torch.eye(2).to_sparse(),
    ],
)
def test_gradients_where_parameters_are_wanted_are_an_error(call, given):
    """Nothing would be clipped, and the norm would be 0."""
    with pytest.raises(GradientError, match="Found no gradient: .*clip_gradients_"):
        call(given)


@pytest.mark.parametrize("call", BY_PARAMETERS)
@pytest.mark.parametrize(
    "given",
    [
        [],
        [*nn.Linear(2, 2).parameters()],
        [*nn.Linear(2, 2).requires_grad_(False).parameters()],
        torch.ones(2, requires_grad=True),
        torch.zeros(2),
    ],
)
def test_parameters_without_gradients_are_none(call, given):
    result = call(given)
    assert result is None or result.item() == 0.0


@pytest.mark.parametrize("clip", [gradclip.clip_gradients_, gradclip.clip_gradients])
def test_parameters_where_gradients_are_wanted_are_an_error(clip):
    """Their values would be scaled."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.ones(2)
    with pytest.raises(GradientError, match="Found a parameter among the gradients"):
        clip([weight], 1.0)
    assert weight.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("call", BY_PARAMETERS + BY_GRADIENTS)
def test_an_iterator_that_was_read_before_is_warned_of(call):
    """At the line that called the function, as torch's own does."""
    parameters = nn.Linear(2, 2).parameters()
    for read in (parameters, iter([])):
        assert len([*read]) in (0, 2)
        with pytest.warns(UserWarning, match="yields no tensor") as caught:
            call(read)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call([])
