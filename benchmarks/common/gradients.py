"""Parameters with fresh gradients to clip, and an optimizer that does nothing."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable

import torch
from torch import nn

import gradclip
from gradclip.engines import engine_for

POOL = 2
"""Sets of gradients in a pool."""


class Still(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that the cost of its hooks is visible."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Do nothing."""


class Gradients:
    """Parameters with gradients that are rewritten from a pool.

    Args:
        shapes: Shapes of the parameters.
        dtype: Dtype of parameters and gradients.
    """

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.parameters = [
            nn.Parameter(torch.randn(shape).mul_(0.05).to(dtype)) for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self._pool = itertools.cycle(
            [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(POOL)]
        )

    def rewrite(self) -> None:
        """Write the next gradients of the pool."""
        for parameter, source in zip(self.parameters, next(self._pool), strict=True):
            parameter.grad.copy_(source)

    @property
    def bytes(self) -> int:
        """Size of all gradients in bytes."""
        return sum(p.numel() * p.element_size() for p in self.parameters)

    def norm(self) -> float:
        """Return the norm in float64."""
        return sum(p.grad.double().square().sum().item() for p in self.parameters) ** 0.5

    def error(self, measure: Callable[..., torch.Tensor] = gradclip.get_total_norm) -> float:
        """Return the relative error of gradclip's norm, or of another one, against float64."""
        return abs(measure([p.grad for p in self.parameters]).item() / self.norm() - 1)


def machine() -> dict[str, object]:
    """Return the versions and settings of this machine."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "engine": engine_for("auto", torch.device("cpu")).name,
    }
