"""Messages that docs/troubleshooting.md quotes are those that gradclip gives."""

import math
import re
import warnings

import pytest
import torch
from torch import nn

from gradclip import GradientClipper
from gradclip.thresholds import ZScore
from tests.support.docs import PAGES

PAGE = " ".join(PAGES["docs/troubleshooting.md"].split())


def two_layers():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def attach_twice():
    optimizer = plain_sgd(two_layers())
    first = GradientClipper(optimizer, 1.0)
    GradientClipper(optimizer, first.steps + 1.0)


def step_without_gradients():
    optimizer = plain_sgd(two_layers())
    GradientClipper(optimizer, 1.0)
    for _ in range(3):
        optimizer.step()


def step_inside_backward():
    model = two_layers()
    optimizer = plain_sgd(model)
    GradientClipper(optimizer, 1.0)
    model[1].weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    model(torch.ones(1, 3)).sum().backward()


def raise_for_nan():
    model = nn.ModuleDict({"body": nn.Linear(3, 2)})
    GradientClipper(optimizer := plain_sgd(model), 1.0, nonfinite="raise", model=model)
    model["body"].weight.grad = torch.ones(2, 3)
    model["body"].weight.grad[0, 0] = math.nan
    optimizer.step()


def pass_a_scheduler():
    GradientClipper(torch.optim.lr_scheduler.StepLR(plain_sgd(two_layers()), 1), 1.0)


def pass_a_differentiable_optimizer():
    GradientClipper(torch.optim.SGD(two_layers().parameters(), lr=0.1, differentiable=True), 1.0)


def skip_lbfgs():
    GradientClipper(torch.optim.LBFGS(two_layers().parameters()), 1.0, exceed="skip")


def share_a_norm_with_muon():
    class Muon(torch.optim.SGD):
        pass

    model = two_layers()
    optimizers = [Muon(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[1].parameters())]
    GradientClipper(optimizers, 1.0)


def clip_an_optimizer_that_clips():
    class Lamb(torch.optim.SGD):
        max_grad_norm = 1.0

    GradientClipper(Lamb(two_layers().parameters(), lr=0.1), 1.0)


QUOTED = [
    attach_twice,
    step_without_gradients,
    step_inside_backward,
    raise_for_nan,
    lambda: GradientClipper(plain_sgd(two_layers()), math.inf),
]
BEGINNINGS = [
    pass_a_scheduler,
    pass_a_differentiable_optimizer,
    skip_lbfgs,
    share_a_norm_with_muon,
    clip_an_optimizer_that_clips,
]


def message_of(provoke):
    """Return the kind and the text of the error or warning that a function provokes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the text is compared
            provoke()
    return f"{raised.type.__name__}: {raised.value}"


@pytest.mark.parametrize("provoke", QUOTED)
def test_a_quoted_message_is_the_message(provoke):
    assert message_of(provoke) in PAGE


@pytest.mark.parametrize("provoke", BEGINNINGS)
def test_a_quoted_beginning_begins_the_message(provoke):
    text = message_of(provoke).partition(": ")[2]
    quoted = re.findall(r"^\| `([^`]+)` \|", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert [begin for begin in quoted if text.startswith(begin)] != []
    assert re.search(": (give|build|choose|switch|leave)|Leave|Build", text, re.IGNORECASE)


def test_a_rule_by_its_class_is_refused():
    assert "give an instance, ZScore(...)" in message_of(lambda: GradientClipper([], ZScore))
