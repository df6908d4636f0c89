"""The table of options, every rule as a fixture, and a training whose norms are given."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradclip import GradientClipper
from tests.support.reference import parameter_with
from tests.support.rules import RULES

OPTIONS = {
    "as it comes": {},
    "observe": {"exceed": "observe"},
    "skip what exceeds": {"exceed": "skip"},
    "skip what is not finite": {"nonfinite": "skip"},
    "skip with a limit": {"nonfinite": "skip", "skip_limit": 3},
    "propagate": {"nonfinite": "propagate"},
    "bounded": {"max_value": 0.1},
    "bounded, skip": {"max_value": 0.1, "exceed": "skip"},
    "bounded, observe": {"max_value": 0.1, "exceed": "observe"},
    "1-norm": {"norm_type": 1.0},
    "infinity norm": {"norm_type": math.inf},
    "parameter": {"scope": "parameter"},
    "unit": {"scope": "unit"},
}


def sgd(
    *gradients: torch.Tensor | list[float], kind: Any = torch.optim.SGD, lr: float = 1.0, **options
) -> torch.optim.Optimizer:
    """Return an optimizer of parameters of ones with these gradients, tensors or lists."""
    tensors = [g if isinstance(g, torch.Tensor) else torch.tensor(g) for g in gradients]
    return kind([parameter_with(tensor, value=1.0) for tensor in tensors], lr=lr, **options)


def optimizer_of(kind: Any = torch.optim.SGD, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer of one weight (1, 1) with the gradient (3, 4)."""
    return sgd([3.0, 4.0], kind=kind, **options)


def gradient(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the gradient of the first weight."""
    return weights_of(optimizer)[0].grad.tolist()


CALLS = ("step()", "step(closure)", "step(closure=closure)")


def step_by(optimizer: Any, call: str, closure: Callable[[], Any]) -> Any:
    """Step with the gradients that a closure computes, before the step or within it."""
    if call == "step()":
        closure()
        return optimizer.step()
    return optimizer.step(closure) if call == CALLS[1] else optimizer.step(closure=closure)


def weights_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of an optimizer, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def stepped(optimizers: Any, max_norm: Any = 1.0, **options: Any) -> GradientClipper:
    """Return a clipper that has taken one step."""
    clipper = GradientClipper(optimizers, max_norm, **options)
    clipper.step()
    return clipper


class Training:
    """An optimizer whose gradients have the norms they are told to have."""

    def __init__(self) -> None:
        self._parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self._parameter], lr=0.0)

    def take(self, *norms: float) -> None:
        """Take one step with each norm."""
        for norm in norms:
            self._parameter.grad = torch.tensor([0.0, norm], dtype=torch.float64)
            self.optimizer.step()


@pytest.fixture
def training() -> type[Training]:
    return Training


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a clipper, those of every policy that does not wait for a device."""
    return OPTIONS[request.param]


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Any:
    """Return every rule of the table, a new one at each call."""
    return RULES[request.param]
