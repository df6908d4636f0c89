"""The usual step: plain gradients on the CPU that share one norm, decided in Python numbers.

A number takes a tenth of the time of a tensor of one element. Everything else about a step is as
in ``step.py``, which serves all other gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.base import CPU, Engine, TensorList
from ..records.parameter_norms import ParameterSums
from ..scopes.naming import describe_nonfinite
from .coefficients import clip_coefficient
from .policies import Settings
from .step import Decision, presence_flag


class HostGradients:
    """The gradients of a step of one optimizer whose norm the host knows at once.

    Its methods are those of `StepGradients`, with a number for each vector of one entry.

    Args:
        engine: The engine that serves the CPU.
        tensors: n >= 1 gradients that `Engine.prepare` has accepted.
        settings: The options of the clipper, without ``max_value``.
        names: The names of the parameters, if their norms are recorded.
    """

    overflow = None
    """GradScaler skips no step of such gradients without the host's knowledge."""
    partial = False
    parameter_sums: ParameterSums | None = None
    """The power sums of the parameters, after `norms` has measured them."""

    def __init__(
        self,
        engine: Engine,
        tensors: TensorList,
        settings: Settings,
        names: Sequence[str] | None,
    ) -> None:
        self._engine = engine
        self.tensors = tensors
        self._settings = settings
        self._names = names

    def norms(self) -> Any:
        """Measure the norm. Nothing is written."""
        order, names = self._settings.norm_type, self._names
        if names is None:
            return self._engine.host_norm(self.tensors, order)
        sums = torch.empty(len(self.tensors), dtype=torch.float64, device="cpu")
        norm = self._engine.host_norm(self.tensors, order, sums)
        nonfinite = None
        if not norm < math.inf:
            # Now, while the gradients still hold the elements that are not finite.
            nonfinite = describe_nonfinite(names, self.tensors, sums.tolist())
        self.parameter_sums = ParameterSums(names, [sums], nonfinite)
        return norm

    def present(self) -> Tensor:
        """Return that there is a gradient; shape (1,), bool."""
        return presence_flag(True, CPU)

    def decide_(self, norm: float, threshold: float) -> Decision:
        """Decide what happens to the gradients; see `StepGradients.decide_`."""
        settings = self._settings
        if norm <= threshold and norm < math.inf:
            return UNCHANGED
        if norm < math.inf:
            skip = settings.exceed == "skip"
        else:
            skip = settings.raises or (settings.skips and settings.nonfinite == "skip")
        coefficient = 1.0 if skip else clip_coefficient(norm, threshold, settings.erases)
        return Decision(skip, coefficient, coefficient)

    def scale_(self, decision: Decision) -> None:
        """Multiply the gradients by the coefficient; write nothing where it is 1."""
        if decision.coefficients != 1 and self._settings.writes:
            self._engine.host_scale_(self.tensors, decision.coefficients)


UNCHANGED = Decision(False, 1.0, 1.0)
"""The decision for a norm that is at most its threshold."""
