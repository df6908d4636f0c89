"""The same optimizers twice: ours with a clipper, theirs clipped by hand in float64."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip import GradientClipper
from tests.support.reference import INF, coefficient_of, gradient_norm, norm_of

LIMIT = 1.0 + 1e-6
MARKS = {"grad_scale", "found_inf"}
SHAPES = [(6, 5), (5, 3), (3,)]

either_order = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
fused_or_not = pytest.mark.parametrize(
    "fused", list(itertools.product([True, False], repeat=2)), ids=lambda f: f"fused {f[0]} {f[1]}"
)


class PlannedError(Exception):
    """An error that a hook or a function raises here."""


# Two layers, and optimizers of them


def layers(count: int = 2, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return the weights of two layers, and a bias if there shall be three."""
    generator = torch.Generator().manual_seed(7)
    made = (torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES[:count])
    return [nn.Parameter(values * 0.5) for values in made]


def layers_loss(step: int, parameters: Sequence[Tensor], factor: float = 1.0) -> Tensor:
    """Return the loss of two layers on the batch of a step."""
    inner, outer, *bias = parameters
    generator = torch.Generator().manual_seed(100 + step)
    batch = torch.randn(8, 9, generator=generator, dtype=inner.dtype)
    found = sum(bias, (batch[:, :6] @ inner).tanh() @ outer)
    return (found - batch[:, 6:]).square().mean() * factor


def joint_loss(step: int, optimizers: Sequence[Optimizer], factor: float = 5.0) -> Tensor:
    """Return the loss of two layers, one in each optimizer."""
    return layers_loss(step, parameters_of(*optimizers[:2])[:2], factor)


def pair() -> list[Optimizer]:
    return [torch.optim.SGD([weight], lr=0.1) for weight in layers()]


def mixed(fused: tuple[bool, bool]) -> list[Optimizer]:
    first, second = layers()
    return [
        torch.optim.Adam([first], lr=0.05, fused=fused[0]),
        torch.optim.SGD([second], lr=0.05, momentum=0.9, fused=fused[1]),
    ]


# What optimizers hold


def parameters_of(*optimizers: Optimizer) -> list[nn.Parameter]:
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


def joint_norm(*optimizers: Optimizer, order: float = 2.0) -> float:
    """Return the norm of all gradients in float64, each tensor once."""
    return gradient_norm(parameters_of(*optimizers), order)


def values_of(*optimizers: Optimizer) -> list[Tensor]:
    return [p.detach().clone() for p in parameters_of(*optimizers)]


def gradients_of(*optimizers: Optimizer) -> list[Tensor]:
    return [p.grad.to_dense().clone() for p in parameters_of(*optimizers)]


def has_marks(*optimizers: Optimizer) -> bool:
    """Return whether an attribute of GradScaler was left on an optimizer."""
    return any(MARKS & set(vars(optimizer)) for optimizer in optimizers)


def clip_by_hand(
    *optimizers: Optimizer, threshold: float = 1.0, bound: float = INF, order: float = 2.0
) -> float:
    """Bound elements, then scale all gradients to a joint threshold; return the norm before."""
    parameters = {p for p in parameters_of(*optimizers) if p.grad is not None}
    gradients = {id(p.grad): p.grad for p in parameters}
    limited = {
        key: gradient.double() if bound == INF else gradient.double().clamp(-bound, bound)
        for key, gradient in gradients.items()
    }
    factor = coefficient_of(norm_of(limited.values(), order), threshold)
    for parameter in parameters:
        if factor < 1 or bound < INF:
            product = limited[id(parameter.grad)] * factor
            parameter.grad = product.to(parameter.grad.dtype)
    return norm_of(gradients.values(), order)


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


def assert_tensors_close(found: Any, needed: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, needed, rtol=tolerance, atol=tolerance / 10)


class Twins:
    """The same optimizers twice: ours with a clipper, theirs clipped by hand."""

    def __init__(
        self, make: Callable[[], Sequence[Optimizer]], max_norm: Any = 1.0, **options: Any
    ) -> None:
        self.ours, self.theirs = [*make()], [*make()]
        self.clipper = GradientClipper(self.ours, max_norm, **options)
        self.steps = watch(*self.ours)

    def backward(self, step: int = 0, factor: float = 5.0) -> None:
        for optimizers in (self.ours, self.theirs):
            joint_loss(step, optimizers, factor).backward()

    def take_by_hand(self, stepping: Sequence[int] | None = None, tolerance: float = 1e-5) -> float:
        """Step with some of theirs, all clipped together; compare and return the norm."""
        norm = clip_by_hand(*self.theirs)
        for number in range(len(self.theirs)) if stepping is None else stepping:
            self.theirs[number].step()
        assert self.clipper.last.norm.item() == pytest.approx(norm, rel=tolerance)
        return norm

    def zero_grad(self, numbers: Sequence[int] | None = None, *, set_to_none: bool = True) -> None:
        for optimizers in (self.ours, self.theirs):
            for number in range(len(optimizers)) if numbers is None else numbers:
                optimizers[number].zero_grad(set_to_none=set_to_none)

    def check(self, tolerance: float = 1e-5) -> None:
        """Compare the parameters, and check the norm of every step."""
        assert_within(self.steps)
        assert_tensors_close(values_of(*self.ours), values_of(*self.theirs), tolerance)


# Under a GradScaler


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
