"""AGC in one pass: which steps take it, and how often the engine is asked."""

import math
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink, Scope
from gradclip.thresholds import RelativeToWeights, Threshold

CALLS = ("clip_rows_", "scale_rows_", "power_sums", "scale_")
ONE_PASS, NOT = ["clip_rows_"], ["power_sums", "power_sums", "scale_"]


class OwnRelativeRule(RelativeToWeights):
    """A rule of a user's own."""


@pytest.fixture
def asked(native_engine, monkeypatch):
    """The names of the engine's methods that were called."""
    if native_engine._walk is None:
        pytest.skip("this version of torch has no exchange interface of DLPack")
    names = []
    for name in CALLS:
        method = getattr(native_engine, name)

        def call(*args, name=name, method=method, **kwargs):
            names.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(native_engine, name, Mock(wraps=call))
    return names


def calls_of_a_step(asked, gradient, rule: Threshold | None = None, **options) -> list[str]:
    network = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with GradientClipper(optimizer, rule or RelativeToWeights(), **options):
        network.weight.grad, network.bias.grad = gradient, torch.ones(4)
        asked.clear()
        optimizer.step()
    return asked


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, ONE_PASS),
        ({"log": MemorySink()}, ONE_PASS),
        ({"exceed": "observe"}, ONE_PASS),
        ({"nonfinite": "propagate"}, ONE_PASS),
        ({"scope": "parameter"}, ONE_PASS),
        ({"scope": Scope("unit", exclude=lambda name, parameter: parameter.dim() < 2)}, ONE_PASS),
        ({"scope": lambda name, _: name}, ONE_PASS),
        ({"nonfinite": "skip"}, [*ONE_PASS, "scale_rows_"]),
        ({"nonfinite": "raise"}, [*ONE_PASS, "scale_rows_"]),
        ({"exceed": "skip"}, ONE_PASS),
        ({"rule": OwnRelativeRule(), "scope": "parameter"}, NOT),
    ],
)
def test_plain_gradients_are_clipped_in_one_pass(asked, options, needed):
    options = {"scope": "unit", **options}
    assert calls_of_a_step(asked, torch.ones(4, 3), **options) == needed


@pytest.mark.parametrize("log", [None, MemorySink()])
def test_a_row_that_is_not_finite_is_counted_before_it_is_erased(asked, log):
    gradient = torch.ones(4, 3)
    gradient[0, 0] = math.nan
    calls = calls_of_a_step(asked, gradient, scope="unit", log=log)
    assert calls == [*ONE_PASS, *["scale_rows_"] * (log is not None)]
    assert gradient[0].tolist() == [0.0] * 3


@pytest.mark.parametrize(
    "make", [lambda: None, lambda: torch.ones(3, 4).t(), lambda: torch.eye(4, 3).to_sparse()]
)
def test_other_gradients_take_the_way_of_all(asked, make):
    assert "clip_rows_" not in calls_of_a_step(asked, make(), scope="unit")


def test_a_step_inside_backward_reads_its_weights_once(asked):
    """Their norms are for the threshold of the step, and for the rule after the whole pass."""
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    optimizers = [torch.optim.SGD([parameter], lr=0.0) for parameter in network.parameters()]
    for parameter, optimizer in zip(network.parameters(), optimizers, strict=True):
        parameter.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
    with GradientClipper(optimizers, RelativeToWeights(), scope="unit"):
        network(torch.ones(3)).sum().backward()
    assert asked == NOT * 2
