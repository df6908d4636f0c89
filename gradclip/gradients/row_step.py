"""The step of adaptive gradient clipping: plain gradients, each or each row with a norm of its own.

The threshold of such a norm follows from the weights behind it alone. So an engine measures a row
and its weights together, and scales the row while it is in cache. Everything else about a step is
as in ``step.py``, which serves all other gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..engines.base import Engine, RelativeLimit, TensorList, host_may_read
from ..engines.cuda_graphs import capturing
from ..records.parameter_norms import ParameterSums
from ..scopes.labels import NormLabels
from ..scopes.naming import describe_nonfinite
from ..scopes.norm_indices import NormIndices, are_separate, gradient_indices, sums_by_norm
from .coefficients import are_finite, has_skip_reason, ones_if_skipped
from .held import distinct
from .policies import Settings
from .step import Decision


class RowPlan:
    """The parameters of an optimizer that are in some norm, and whether they can be clipped by row.

    Args:
        parameters: All parameters of the optimizer.
        labels: The labels of the norms.
    """

    def __init__(self, parameters: Sequence[Tensor], labels: NormLabels) -> None:
        labelled = [(p, labels.of(p)) for p in distinct([*parameters])]
        labelled = [(p, entry) for p, entry in labelled if entry.norm_indices is not None]
        self.parameters = [p for p, _ in labelled]
        self.names = [entry.name for _, entry in labelled]
        self.norm_indices = tuple(e.norm_indices for _, e in labelled if e.norm_indices is not None)
        self.by_rows = any(indices.rows for indices in self.norm_indices)
        rows = [self.by_rows and p.dim() > 1 for p in self.parameters]
        self.is_possible = (
            rows == [indices.rows for indices in self.norm_indices]
            and are_separate(self.norm_indices, len(labels.names))
            and not any(threshold is not None for threshold in labels.group_thresholds)
        )
        """True if each parameter, or each index of its dimension 0, has a norm of its own, in
        order, with a threshold from the clipper's rule."""
        self._made_for, self._labels = parameters, labels.names

    def fits(self, parameters: Sequence[Tensor], labels: NormLabels) -> bool:
        """Return whether it was made for these parameters and labels."""
        return (
            self._labels is labels.names
            and len(parameters) == len(self._made_for)
            and all(map(is_, parameters, self._made_for))
        )


class RowGradients:
    """The gradients of a step whose thresholds are in proportion to the norms of the weights.

    Its methods are those of `StepGradients`.

    Args:
        engine: The engine that serves the device.
        tensors: The gradients, which `Engine.prepare_rows` has accepted.
        weights: The parameters, as prepared.
        norm_indices: The norm indices of each gradient.
        limit: The rule of the thresholds.
        settings: The options of the clipper, without ``max_value``.
        names: The names of the parameters, if their norms are recorded.
    """

    overflow = None
    """A step whose overflow only the device knows is one of `StepGradients`."""
    partial = False
    parameter_sums: ParameterSums | None = None
    """The power sums of the parameters, after `norms` has measured them."""
    loss: float | Tensor | None = None
    """The loss of the step."""
    thresholds: Tensor
    """The thresholds of the norms, shape (k,), after `norms` has measured them."""

    def __init__(
        self,
        engine: Engine,
        tensors: TensorList,
        weights: TensorList,
        norm_indices: tuple[NormIndices, ...],
        limit: RelativeLimit,
        settings: Settings,
        names: Sequence[str] | None,
    ) -> None:
        self._engine = engine
        self.tensors = tensors
        self._weights = weights
        self._norm_indices = norm_indices
        self._limit = limit
        self._settings = settings
        self._names = None if capturing() else names
        self._may_skip = settings.skips or settings.raises
        self._to_apply: Tensor | None = None
        """Coefficients that `scale_` has yet to apply; None if all are."""

    def norms(self) -> Any:
        """Measure the norms, shape (k,), and scale rows in the same pass.

        Not if one of the norms may skip the step. Nor are rows erased whose elements that are not
        finite are counted for the record: `scale_` erases them.
        """
        settings = self._settings
        counted = self._names is not None and host_may_read(self.tensors[0])
        norms, self.thresholds, self._coefficients = self._engine.clip_rows_(
            self.tensors,
            self._weights,
            settings.norm_type,
            self._limit,
            erase=settings.erases and not counted,
            write=settings.writes and not self._may_skip,
        )
        if self._names is not None:
            self._record(self._names, norms, counted)
        return norms

    def decide_(self, norms: Tensor, thresholds: Tensor) -> Decision:
        """Decide what happens to the gradients; see `StepGradients.decide_`."""
        settings, coefficients = self._settings, self._coefficients
        if not self._may_skip:
            return Decision(False, coefficients, coefficients)
        reason = has_skip_reason(
            norms,
            thresholds,
            nonfinite=settings.nonfinite in ("skip", "raise"),
            exceeding=settings.exceed == "skip",
        )
        skip = bool(reason) if settings.raises or host_may_read(reason) else reason
        self._to_apply = ones_if_skipped(skip, coefficients)
        return Decision(skip, self._to_apply, self._to_apply)

    def scale_(self, decision: Decision) -> None:
        """Multiply the gradients by the coefficients that `norms` has not applied."""
        if self._to_apply is not None and self._settings.writes and decision.skip is not True:
            self._engine.scale_rows_(self.tensors, self._to_apply)

    def _record(self, names: Sequence[str], norms: Tensor, counted: bool) -> None:
        """Keep the power sums of the parameters, and count elements that are not finite."""
        order = self._settings.norm_type
        powers = norms.clone() if order == math.inf else norms.pow(order)
        indices = gradient_indices(self._norm_indices)
        sums, nonfinite = sums_by_norm(powers, order, indices, len(names)), None
        if (counted or self._settings.raises) and not are_finite(norms):
            nonfinite = describe_nonfinite(names, self.tensors, sums.tolist())
            if counted and self._settings.erases:
                finite = norms < math.inf
                self._to_apply = finite.to(norms.dtype)
                self._coefficients = torch.where(finite, self._coefficients, 0.0)
        self.parameter_sums = ParameterSums(names, [sums], nonfinite)
