"""The threshold of every norm, from its parameter group or from the clipper's rule.

A parameter group with a ``max_norm`` of its own has a constant threshold. The rule of the clipper
sets the thresholds of all other norms, and learns only from these norms.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.base import CPU, has_values, host_may_read
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import ArgumentError
from ..ranks.layout import RankLayout
from ..ranks.shared_loss import mean_loss
from ..records.record import ClipRecord, as_vector, clipped_norms
from ..scopes.labels import NormLabels
from ..thresholds import Fixed, StepContext, Threshold, is_foreign, learns
from .foreign_context import foreign_context
from .host_step import HostGradients
from .parts import StepPart, StepParts
from .row_step import RowGradients
from .step import StepGradients, presence_flag
from .without_values import GradientsWithoutValues

AnyNorms = (
    StepGradients | StepPart | StepParts | HostGradients | RowGradients | GradientsWithoutValues
)
"""The gradients whose norms a rule limits, all or a part of them."""
PRESENT_ALONE = HostGradients, GradientsWithoutValues
"""Gradients that tell a rule no more than that they are there."""

_LEARNING: WeakValueDictionary[int, NormThresholds] = WeakValueDictionary()
"""The clipper's object that serves each learning rule, by the id of the rule.

A rule that learned from the norms of two clippers would mix them. The registry refuses the second
clipper, until the first is detached or collected. It is not an attribute of the rule, which a copy
would inherit: a copied rule may serve another clipper. Nor is the rule itself a key, since a user's
class may define ``__eq__`` and so have no hash. An id stays valid: the value keeps its rule alive.
"""

NO_CONTEXT = StepContext(0, presence_flag(True, CPU))
"""For a fixed threshold, which asks for nothing of a step."""


class NormThresholds:
    """Applies the rule to the norms of each step and feeds the outcome back to it.

    Args:
        threshold: The clipper's rule.
        labels: The labels of the norms, with the thresholds of parameter groups.
        rank_layout: The ranks that the norms span.
        device: The device of the norms.
        order: p of the norms.

    Raises:
        ArgumentError: The rule learns and serves another clipper.
    """

    def __init__(
        self,
        threshold: Threshold,
        labels: NormLabels,
        rank_layout: RankLayout,
        device: torch.device,
        order: float,
    ) -> None:
        self._threshold = threshold
        self._labels = labels
        self._rank_layout = rank_layout
        self._device = device
        self._order = order
        self._learns, self._foreign = learns(threshold), is_foreign(threshold)
        self._reads_clipped = self._foreign or getattr(threshold, "observes_clipped", True)
        self._reads_loss = self._foreign or threshold.needs_loss
        self._is_fixed, self._rule = type(threshold) is Fixed, cast(Any, threshold)
        self._context: StepContext | None = None
        self._started: tuple[str, ...] = ()
        self._rule_indices: Tensor | None = None
        self._group_thresholds = torch.empty(0, device="cpu")
        if id(threshold) in _LEARNING:
            raise ArgumentError(
                f"{threshold!r} already learns from the norms of another clipper, and would mix "
                "them with those of this one: make a threshold for each clipper, or detach() the "
                "other clipper first."
            )
        self.follow_labels()

    def claim(self) -> None:
        """Reserve a learning rule for this clipper."""
        if self._learns:
            _LEARNING[id(self._threshold)] = self

    def release(self) -> None:
        """Free the rule for another clipper."""
        if _LEARNING.get(id(self._threshold)) is self:
            del _LEARNING[id(self._threshold)]

    def at_step(
        self,
        gradients: AnyNorms,
        norms: Tensor | float,
        step: int,
        when: str = "before optimizer.step(), or return the loss from the closure",
    ) -> Any:
        """Return the thresholds of all norms.

        No host sync, unless a rule reads a loss that is on a device, and its norms are on the CPU.

        Args:
            gradients: The gradients of the step.
            norms: Their norms, shape (k,), or the one norm as a number.
            step: Index of the step.
            when: When to assign a loss, for the error.

        Returns:
            Shape (k,), on the device of the norms; or a number.

        Raises:
            ArgumentError: The rule needs a loss, and there is none; or it returned no float tensor,
                another shape or device, or, on the CPU, a number that is no threshold.
            AttachError: A user's own rule reads a loss that other ranks do not share.
        """
        if self._labels.names is not self._started:
            self.follow_labels()
        if isinstance(norms, Tensor) and not has_values(norms):
            self._context = None
            return torch.full_like(norms, math.inf)  # a rule may compare values, and learns none
        if isinstance(norms, Tensor) and capturing():
            keep_if_captured(
                self._group_thresholds,
                self._rule_indices,
                {**getattr(self._threshold, "__dict__", {})},
            )
        if self._is_fixed and isinstance(norms, float):
            return self._rule.thresholds(norms, NO_CONTEXT)
        if isinstance(gradients, RowGradients):
            return gradients.thresholds  # of a rule that learns nothing, applied by the engine
        weight_norms = None
        if self._threshold.needs_weights and not isinstance(gradients, PRESENT_ALONE):
            weight_norms = gradients.weight_norms()
        loss = gradients.loss if self._reads_loss else None
        if loss is not None:
            loss = _loss_beside(norms, loss)
        elif self._threshold.needs_loss:
            raise ArgumentError(
                f"{self._threshold!r} decides by the loss of the step, and there is none: assign "
                f"clipper.loss = loss {when}."
            )
        context = StepContext(step, gradients.present(), self._order, weight_norms, loss)
        if isinstance(norms, Tensor):
            norms, context = self._ruled(gradients, norms, context)
        # The norm of some of the gradients says nothing about the norm of all.
        self._context = context if self._learns and not gradients.partial else None
        if isinstance(norms, Tensor) and not norms.numel():
            return self._group_thresholds
        thresholds = self._rule_thresholds(norms, context)
        if self._rule_indices is None:
            return thresholds
        return self._group_thresholds.index_copy(0, self._rule_indices, thresholds)

    def of_micro_batch(
        self,
        gradients: StepGradients,
        norms: Tensor,
        step: int,
        count: int,
    ) -> Tensor:
        """Return the thresholds of one of ``count`` micro-batches; the rule learns nothing.

        ``threshold / count``, where the threshold is that of a step whose micro-batches are all
        like this one: its norms are at most ``count * norms``.

        Args:
            gradients: The gradients of the micro-batch.
            norms: Their norms, shape (k,).
            step: Index of the step that they are accumulated for.
            count: Number of the micro-batches.
        """
        when = (
            "within the block of micro_batch(), before it ends, of the scale of a step's loss (not "
            "divided by the number of micro-batches)"
        )
        thresholds: Tensor = self.at_step(gradients, norms * count, step, when)
        return thresholds / count

    def observe(self, record: ClipRecord) -> None:
        """Let the rule learn from a step that was taken or skipped. No host sync."""
        context, rule = self._context, self._threshold
        if context is None or (record.skipped is True and not rule.observes_skipped):
            return
        norms = clipped_norms = record.values[0]
        if self._reads_clipped:
            clipped_norms = _observed_clipped_norms(record, exact=self._foreign)
        if record.is_number:
            if self._foreign:
                norms, clipped_norms = as_vector(norms), as_vector(clipped_norms)
                context = self._given(context)
            rule.observe(norms, clipped_norms, context)
            return
        if self._rule_indices is not None:
            norms = norms[self._rule_indices]
            clipped_norms = clipped_norms[self._rule_indices] if self._reads_clipped else norms
        # A skip that only the device knows cannot end this method: the rule runs, and sees norms
        # without gradients, which it has to ignore.
        for skipped in (None if rule.observes_skipped else record.skipped, record.overflow):
            if isinstance(skipped, Tensor):
                usable = None if context.usable is None else context.usable & ~skipped
                context = replace(context, present=context.present & ~skipped, usable=usable)
        if record.overflow is not None and context.loss is not None:
            # A step of GradScaler's, of which nothing is learned: a NaN is in no window.
            context = replace(context, loss=torch.where(record.overflow, math.nan, context.loss))
        if not norms.numel():
            return
        if self._foreign:
            norms, context = norms.clone(), self._given(context)
        elif _is_number(norms):
            norms, clipped_norms = norms.item(), clipped_norms.item()
        rule.observe(norms, clipped_norms, context)

    def _ruled(
        self, gradients: AnyNorms, norms: Tensor, context: StepContext
    ) -> tuple[Tensor, StepContext]:
        """Return the norms that the rule sets thresholds for, and their context."""
        all_norms, ruled = norms, self._rule_indices
        if ruled is not None:
            weights, norms = context.weight_norms, norms[ruled]
            weights = None if weights is None else weights[ruled]
            context = replace(context, present=context.present[ruled], weight_norms=weights)
        trusted = self._learns and not self._foreign and not _is_number(norms)
        if trusted and isinstance(gradients, StepGradients):
            usable = gradients.usable(all_norms)
            context.usable = usable if ruled is None else usable[ruled]
        return norms, context

    def _rule_thresholds(self, norms: Any, context: StepContext) -> Any:
        """Return what the rule allows, numbers for numbers and tensors for tensors."""
        rule = self._rule
        if self._foreign:
            # A user's own rule may write to its arguments, which the record keeps: it gets copies.
            vector = as_vector(norms)
            found = _checked(rule, rule.thresholds(vector.clone(), self._given(context)), vector)
            return found.item() if isinstance(norms, float) else found
        # The rules of this package take one norm as a number, which is ten times as fast.
        if isinstance(norms, Tensor) and _is_number(norms):
            return torch.full_like(norms, rule.thresholds(norms.item(), context))
        return rule.thresholds(norms, context)

    def _given(self, context: StepContext) -> StepContext:
        """Return the context that a user's own rule gets."""
        return foreign_context(context, self._threshold, self._rank_layout.norm_ranks)

    def follow_labels(self) -> None:
        """Start the rule, and again whenever there are new labels."""
        names, constants = self._labels.names, self._labels.group_thresholds
        # By identity: labels make another tuple when they change, and only then.
        if names is self._started:
            return
        ruled = [index for index, constant in enumerate(constants) if constant is None]
        dtype = norm_dtype(self._device)
        if len(ruled) < len(names):
            values = [math.inf if constant is None else constant for constant in constants]
            self._group_thresholds = torch.tensor(values, dtype=dtype, device=self._device)
            self._rule_indices = torch.tensor(ruled, dtype=torch.int64, device=self._device)
        self._threshold.start(tuple(names[i] for i in ruled), self._device, dtype)
        self._started = names


def _loss_beside(norms: Tensor | float, loss: Tensor | float) -> Tensor | float:
    """Return a loss as a number if the host has the norms, else 0-d on their device."""
    if isinstance(loss, Tensor) and loss.dim():
        loss = mean_loss(loss)
    if isinstance(norms, float) or host_may_read(norms):
        return loss if isinstance(loss, float) else loss.item()
    return norms.new_full((), loss) if isinstance(loss, float) else loss.to(norms)


def _is_number(norms: Tensor) -> bool:
    return norms.numel() == 1 and host_may_read(norms)


def _observed_clipped_norms(record: ClipRecord, *, exact: bool) -> Any:
    """Return the norms after scaling; for a skipped step, those that scaling would have given.

    Args:
        record: The record of the step.
        exact: True for 0 where an infinite norm was set to 0; else it is NaN, which is not usable.
    """
    norms, thresholds, coefficients = record.values
    # The coefficients of a skipped step are 1, so that its thresholds say what scaling would give.
    scaled = clipped_norms(norms, coefficients) if exact else norms * coefficients
    if record.skipped is False:
        return scaled
    if record.is_number:
        return min(norms, thresholds)
    allowed = torch.minimum(norms, thresholds)
    return allowed if record.skipped is True else torch.where(record.skipped, allowed, scaled)


def _checked(threshold: Threshold, found: object, norms: Tensor) -> Tensor:
    """Check the tensor that a user's own rule returned; its values only if no device must wait."""
    name = f"{type(threshold).__name__}.thresholds()"
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.is_sparse:
        kind = f"tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ArgumentError(
            f"{name} returned a {kind}: return a dense tensor of shape {tuple(norms.shape)} and "
            f"dtype {norms.dtype}."
        )
    if found.shape != norms.shape or found.device != norms.device:
        raise ArgumentError(
            f"{name} returned the shape {tuple(found.shape)} on {found.device}: return one "
            f"threshold for each norm, shape {tuple(norms.shape)} on {norms.device}."
        )
    # For a NaN or infinite norm the option nonfinite decides, whatever its threshold is.
    if host_may_read(found) and not bool(((found >= 0) | ~norms.isfinite()).all()):
        raise ArgumentError(
            f"{name} returned {found.tolist()}: return numbers >= 0, infinity for no threshold."
        )
    return found.to(norms.dtype)
