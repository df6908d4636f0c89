"""The usual step: plain gradients on the CPU that share one norm, decided in Python numbers.

The norm may span ranks: what one collective brings is on the host as well. A number takes a tenth
of the time of a tensor of one element. Everything else about a step is as in ``step.py``, which
serves all other gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.base import CPU, INFINITY, Engine, TensorList, host_root
from ..ranks.shards import Parts
from ..ranks.shared_loss import host_loss_numbers, host_mean_loss
from ..records.parameter_norms import ParameterSums
from ..scopes.naming import describe_nonfinite
from ..scopes.norm_indices import NormIndices, sums_by_norm
from .coefficients import clip_coefficient
from .differentiable import refuse_graphs, require_grad, scale_tracked_
from .policies import Settings
from .step import Decision, presence_flag


class HostGradients:
    """The gradients of a step whose norm the host knows at once.

    Its methods are those of `StepGradients`, with a number for each vector of one entry.

    Args:
        engine: The engine that serves the CPU.
        tensors: n >= 1 gradients that `Engine.prepare` has accepted.
        settings: The options of the clipper, without ``max_value``.
        names: The names of the parameters, if their norms are recorded; else empty.
        partial: As for `StepGradients`.
    """

    overflow = None
    """GradScaler skips no step of such gradients without the host's knowledge."""
    parameter_sums: ParameterSums | None = None
    """The power sums of the parameters, after `norms` has measured them."""
    loss: float | Tensor | None = None
    """The loss of the step on this rank; after `norms` that of all ranks."""

    def __init__(
        self,
        engine: Engine,
        tensors: TensorList,
        settings: Settings,
        names: Sequence[str],
        partial: bool,
    ) -> None:
        self._engine = engine
        self.tensors: Sequence[Tensor] = tensors
        self._local = tensors
        self._settings = settings
        self._names = names
        self.partial = partial
        """True if gradients of an optimizer are missing, because GradScaler skips its step."""

    def norms(self) -> Any:
        """Measure the norm. Nothing is written."""
        order, names = self._settings.norm_type, self._names
        if not names:
            return self._engine.host_norm(self._local, order)
        sums = torch.empty(len(self._local), dtype=torch.float64, device="cpu")
        norm = self._engine.host_norm(self._local, order, sums)
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
        if decision.coefficients == 1 or not self._settings.writes:
            return
        if require_grad(self._local):
            self._scale_in_graph_(decision.coefficients)
        else:
            self._engine.host_scale_(self._local, decision.coefficients)

    def _scale_in_graph_(self, coefficient: float) -> None:
        scale_tracked_(self._local, coefficient, self._settings.norm_type)


class SharedHostGradients(HostGradients):
    """The same for gradients whose norm spans ranks, which one collective adds up.

    Args:
        engine: The engine that serves the CPU.
        tensors: n >= 1 gradients.
        parts: Their parts on this rank, which `Engine.prepare` has accepted.
        settings: The options of the clipper, without ``max_value``.
        names: The names of the parameters of all ranks, if their norms are recorded; else empty.
        parameter_indices: The index of each gradient among these names.
        needs_present: True if the threshold reads whether any rank has a gradient.
        partial: As for `StepGradients`.
    """

    def __init__(
        self,
        engine: Engine,
        tensors: Sequence[Tensor],
        parts: Parts,
        settings: Settings,
        names: Sequence[str],
        parameter_indices: tuple[NormIndices, ...],
        needs_present: bool,
        partial: bool,
    ) -> None:
        super().__init__(engine, parts.tensors, settings, names, partial)
        self.tensors = tensors
        self._parts = parts
        self._parameter_indices = parameter_indices
        self._needs_present = needs_present

    def _scale_in_graph_(self, coefficient: float) -> None:
        refuse_graphs(self._local, "a norm across ranks")

    def norms(self) -> Any:
        """Measure the norm together with the other ranks. Collective. Nothing is written."""
        order = self._settings.norm_type
        sums, total = _sums_and_total(self._engine, self._parts, order)
        names = self._names
        # Laid out as by `measure_across_ranks`, which serves the ranks without gradients.
        losses = host_loss_numbers(self.loss, order)
        rest = [1.0, *losses] if self._needs_present else losses
        here = [total, NO_LOSS if rest == [0.0, 0.0] else total.new_tensor(rest)]
        if names:
            here.insert(1, sums_by_norm(sums, order, self._parameter_indices, len(names)))
        vector = self._parts.group.reduced_(torch.cat(here), order)
        numbers = vector.tolist()
        self.loss = host_mean_loss(numbers[-len(losses) :], order)
        norm = host_root(numbers[0], order)
        if names:
            sums, nonfinite = vector[1 : 1 + len(names)], None
            if not norm < math.inf:
                nonfinite = describe_nonfinite(names, None, sums.tolist())
            self.parameter_sums = ParameterSums(names, [sums], nonfinite)
        return norm


def clip_parts_(engine: Engine, parts: Parts, limit: float, order: float) -> Tensor:
    """Scale gradients that are spread over ranks to a joint norm of at most ``limit``. Collective.

    Gradients whose norm is NaN or infinite stay as they are.

    Args:
        engine: The engine that serves the CPU.
        parts: Their parts on this rank, which `Engine.prepare` has accepted.
        limit: The threshold.
        order: p of the p-norm.

    Returns:
        The norm before, the same bits on all ranks; 0-d, float64.
    """
    _, total = _sums_and_total(engine, parts, order)
    power_sum = parts.group.reduced_(total, order)
    norm = host_root(power_sum.item(), order)
    coefficient = clip_coefficient(norm, limit, erase=False)
    if coefficient != 1:
        engine.host_scale_(parts.tensors, coefficient)
    return power_sum.fill_(norm).squeeze(0)


def _sums_and_total(engine: Engine, parts: Parts, order: float) -> tuple[Tensor, Tensor]:
    """Return the power sum of each part, 0 where another rank counts it, and that of all parts."""
    if parts.counts:
        sums = engine.host_power_sums(parts.tensors, order)
    else:
        sums = torch.zeros(len(parts.tensors), dtype=torch.float64, device="cpu")
    return sums, sums.amax(0, keepdim=True) if order == INFINITY else sums.sum(0, keepdim=True)


NO_LOSS = torch.zeros(2, dtype=torch.float64, device="cpu")
"""What a rank without a loss sends beside its power sum; made once, as it is sent at every step."""
UNCHANGED = Decision(False, 1.0, 1.0)
"""The decision for a norm that is at most its threshold."""
