"""The gradients of a step on meta or fake tensors, which have shapes and no values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import norm_dtype
from .step import Decision


class GradientsWithoutValues:
    """Stand-in for `StepGradients` in a program that only shows its shapes and its memory.

    Its norms are as empty as the gradients: no rule learns from them, and no record of them is
    counted or logged.

    Args:
        tensors: The gradients, meta or fake tensors.
        count: k, the number of norms.
        device: The device of the norms.
    """

    overflow = None
    partial = True
    """True, so that the rule does not learn."""
    parameter_sums = None
    loss: float | Tensor | None = None

    def __init__(self, tensors: Sequence[Tensor], count: int, device: torch.device) -> None:
        self.tensors = tensors
        self._count = count
        self._device = device

    def norms(self) -> Any:
        """Return the norms; shape (k,)."""
        return torch.empty(self._count, dtype=norm_dtype(self._device), device=self._device)

    def present(self) -> Tensor:
        """Return that every norm has a gradient; shape (k,), bool."""
        return torch.ones(self._count, dtype=torch.bool, device=self._device)

    def decide_(self, norms: Tensor, thresholds: Tensor) -> Decision:
        """Return that the step is taken."""
        return Decision(False, torch.ones_like(norms), torch.ones_like(norms))

    def scale_(self, decision: Decision) -> None:
        """Write nothing."""
