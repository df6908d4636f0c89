"""Whole trainings inside a backward pass, of parameters that have no part in it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from gradclip import GradientClipper
from gradclip.thresholds import Percentile
from tests.support.twins import clip_by_hand

STEPS = 4


def ends_of_training(count: int, *, by_hand: bool) -> tuple[list[float], int]:
    """Train new parameters with some optimizers; return these at the end, and the steps seen."""
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(count)]
    optimizers = [SGD([weight], lr=0.1, momentum=0.9) for weight in weights]
    clipper = None if by_hand else GradientClipper(optimizers, 1.0)
    with torch.enable_grad():
        for step in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            sum((w - 3.0 * step).square().sum() for w in weights).backward()
            if by_hand:
                clip_by_hand(*optimizers)
            for optimizer in optimizers:
                optimizer.step()
    ends = [value for weight in weights for value in weight.tolist()]
    return ends, STEPS if clipper is None else clipper.steps


def in_function(run: Callable[[], None]) -> None:
    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            run()
            return gradient

    Within.apply(torch.ones(2, requires_grad=True)).sum().backward()


def in_checkpoint(run: Callable[[], None], *, reentrant: bool) -> None:
    def compute(x: Tensor) -> Tensor:
        run()
        return x.sin()

    outer = torch.ones(2, requires_grad=True) * 2
    checkpoint(compute, outer, use_reentrant=reentrant).sum().backward()


PLACES = {
    "function": in_function,
    "checkpoint": lambda run: in_checkpoint(run, reentrant=False),
    "reentrant checkpoint": lambda run: in_checkpoint(run, reentrant=True),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("count", [1, 2], ids=["one optimizer", "two optimizers"])
def test_a_training_inside_is_that_outside(place, count):
    """Also where a checkpoint takes it twice, before the backward pass and within it."""
    needed = ends_of_training(count, by_hand=True)
    found: list[tuple[list[float], int]] = []
    PLACES[place](lambda: found.append(ends_of_training(count, by_hand=False)))
    assert len(found) == (1 if place == "function" else 2)
    for values, steps in found:
        assert steps == needed[1]
        assert values == pytest.approx(needed[0])


def test_a_rule_learns_inside():
    """Records and thresholds of steps inside go on with those outside."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, Percentile(50, window=4))

    def step(norm: float) -> None:
        weight.grad = torch.full((1,), norm)
        optimizer.step()

    step(1.0)
    in_function(lambda: step(3.0))
    step(5.0)
    assert clipper.steps == 3
    assert clipper.last.threshold.item() == pytest.approx(3.0)
