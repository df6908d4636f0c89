"""Two optimizers that share one norm, beside the same two clipped by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip import GradientClipper
from tests.support.reference import gradient_norm

LIMIT = 1.0 + 1e-6
MARKS = {"grad_scale", "found_inf"}

either_order = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
fused_or_not = pytest.mark.parametrize(
    "fused", list(itertools.product([True, False], repeat=2)), ids=lambda f: f"fused {f[0]} {f[1]}"
)


def parameters_of(*optimizers: Optimizer) -> list[nn.Parameter]:
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


def joint_norm(*optimizers: Optimizer) -> float:
    """Return the norm of all gradients in float64, each tensor once."""
    return gradient_norm(parameters_of(*optimizers))


def joint_values(*optimizers: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in parameters_of(*optimizers)]


def gradients_of(*optimizers: Optimizer) -> list[Tensor]:
    return [p.grad.clone() for p in parameters_of(*optimizers)]


def has_marks(*optimizers: Optimizer) -> bool:
    """Return whether an attribute of GradScaler was left on an optimizer."""
    return any(MARKS & set(vars(optimizer)) for optimizer in optimizers)


def clip_by_hand(*optimizers: Optimizer, threshold: float = 1.0) -> float:
    """Scale all gradients so that their joint norm is within the threshold; return it before."""
    norm = joint_norm(*optimizers)
    for parameter in parameters_of(*optimizers):
        if parameter.grad is not None:
            parameter.grad *= min(1.0, threshold / norm)
    return norm


def watch(*optimizers: Optimizer) -> list[tuple[int, float]]:
    """Note number and norm of every step: hooks that see the gradients as clipped."""
    steps: list[tuple[int, float]] = []
    for number, optimizer in enumerate(optimizers):
        optimizer.register_step_pre_hook(lambda o, *_, n=number: steps.append((n, joint_norm(o))))
    return steps


def assert_within(steps: Sequence[tuple[int, float]]) -> None:
    """Check that no step exceeded the threshold 1, but for overflows that a fused one was given."""
    assert steps
    assert all(norm <= LIMIT for _, norm in steps if math.isfinite(norm))


def assert_tensors_close(
    found: Sequence[Tensor], needed: Sequence[Tensor], tolerance: float = 1e-5
) -> None:
    torch.testing.assert_close(list(found), list(needed), rtol=tolerance, atol=tolerance / 10)


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (3, 2)]]


def pair() -> list[Optimizer]:
    return [torch.optim.SGD([weight], lr=0.1) for weight in weights()]


def mixed(fused: tuple[bool, bool]) -> list[Optimizer]:
    first, second = weights()
    return [
        torch.optim.Adam([first], lr=0.05, fused=fused[0]),
        torch.optim.SGD([second], lr=0.05, momentum=0.9, fused=fused[1]),
    ]


def joint_loss(step: int, optimizers: Sequence[Optimizer], factor: float = 3.0) -> Tensor:
    """Return the loss of two layers, one in each optimizer."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs, targets = (torch.randn(6, width, generator=generator) for width in (4, 2))
    first, second = parameters_of(*optimizers[:2])[:2]
    return ((torch.tanh(inputs @ first) @ second - targets) ** 2).mean() * factor


def joint_scaler(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**12, "growth_interval": 2, **options})


def scaled_round(
    optimizers: Sequence[Optimizer],
    scaler: torch.amp.GradScaler,
    order: Sequence[int],
    *,
    step: int = 0,
    unscale: bool = False,
    overflow: int | None = None,
    infinite: bool = False,
) -> None:
    """Take one iteration under a GradScaler, without its update."""
    scaler.scale(joint_loss(step, optimizers) * (math.inf if infinite else 1)).backward()
    if overflow is not None:
        parameters_of(optimizers[overflow])[0].grad[0, 0] = math.inf
    for optimizer in optimizers if unscale else ():
        scaler.unscale_(optimizer)
    for number in order:
        scaler.step(optimizers[number])
        assert not has_marks(optimizers[number])


class Twins:
    """The same optimizers twice: ours with a clipper, theirs clipped by hand."""

    def __init__(
        self, make: Callable[[], list[Optimizer]], max_norm: Any = 1.0, **options: Any
    ) -> None:
        self.ours, self.theirs = make(), make()
        self.clipper = GradientClipper(self.ours, max_norm, **options)
        self.steps = watch(*self.ours)

    def take_by_hand(self, stepping: Sequence[int] = (0, 1), tolerance: float = 1e-5) -> float:
        """Step with some of theirs, all clipped together; compare and return the norm."""
        norm = clip_by_hand(*self.theirs)
        for number in stepping:
            self.theirs[number].step()
        assert self.clipper.last.norm.item() == pytest.approx(norm, rel=tolerance)
        return norm

    def zero_grad(self, numbers: Sequence[int] = (0, 1), *, set_to_none: bool = True) -> None:
        for number in numbers:
            self.ours[number].zero_grad(set_to_none=set_to_none)
            self.theirs[number].zero_grad(set_to_none=set_to_none)

    def check(self, tolerance: float = 1e-5) -> None:
        """Compare the parameters, and check the norm of every step."""
        assert_within(self.steps)
        assert_tensors_close(joint_values(*self.ours), joint_values(*self.theirs), tolerance)
