"""The largest norm of every label: the clipper's threshold, beside those of parameter groups."""

from __future__ import annotations

import math
from dataclasses import replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.base import host_may_read
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import ArgumentError
from ..records.record import ClipRecord, clipped_norms
from ..scopes.labels import NormLabels
from ..thresholds import StepContext, Threshold, is_foreign, learns
from .step import StepGradients

_LEARNING: WeakValueDictionary[int, NormThresholds] = WeakValueDictionary()
"""By the id of each threshold that learns, the one that serves it."""


class NormThresholds:
    """Asks a threshold about the norms that it rules, and tells it what became of them.

    Args:
        threshold: The clipper's threshold.
        labels: The labels, with the thresholds of groups that have their own.
        device: Where norms will be.
        order: p of the norms.

    Raises:
        ArgumentError: The threshold learns, and another clipper uses it.
    """

    def __init__(
        self, threshold: Threshold, labels: NormLabels, device: torch.device, order: float
    ) -> None:
        self._threshold = threshold
        self._labels = labels
        self._device = device
        self._order = order
        self._learns, self._foreign = learns(threshold), is_foreign(threshold)
        self._context: StepContext | None = None
        self._started: tuple[str, ...] = ()
        self._ruled: Tensor | None = None
        self._own = torch.empty(0, device="cpu")
        if id(threshold) in _LEARNING:
            raise ArgumentError(
                f"{threshold!r} learns from the norms of another clipper already, which this "
                "one's would mix with: make one for each clipper, or detach() the other first."
            )
        self.follow_labels()

    def claim(self) -> None:
        """Take a threshold that learns for this clipper alone."""
        if self._learns:
            _LEARNING[id(self._threshold)] = self

    def release(self) -> None:
        """Leave the threshold to another clipper."""
        if _LEARNING.get(id(self._threshold)) is self:
            del _LEARNING[id(self._threshold)]

    def at_step(self, gradients: StepGradients, norms: Tensor, step: int) -> Tensor:
        """Return the thresholds of all norms.

        Args:
            gradients: The gradients that were measured.
            norms: Shape (k,).
            step: Index of the step.

        Returns:
            Shape (k,), on the same device.

        Raises:
            ArgumentError: The threshold returned another shape, or on another device, or on the CPU
            a number that is no limit.
        """
        self.follow_labels()
        if capturing():
            keep_if_captured(self._own, self._ruled, {**getattr(self._threshold, "__dict__", {})})
        weight_norms = gradients.weight_norms() if self._threshold.needs_weights else None
        context = StepContext(step, gradients.present(), self._order, weight_norms)
        if self._ruled is not None:
            norms, context = norms[self._ruled], _part(context, self._ruled)
        # The norm of a part of the gradients is no example of what is to be expected.
        self._context = context if self._learns and not gradients.partial else None
        if not norms.numel():
            return self._own
        thresholds = self._asked(norms, context)
        if self._ruled is None:
            return thresholds
        return self._own.index_copy(0, self._ruled, thresholds)

    def observe(self, record: ClipRecord) -> None:
        """Let the threshold learn from the step that it was asked about."""
        context, observes_skipped = self._context, self._threshold.observes_skipped
        if context is None or (record.skipped is True and not observes_skipped):
            return
        clipped_norms = _clipped_norms(record)
        norms = record.norms
        if self._ruled is not None:
            norms, clipped_norms = norms[self._ruled], clipped_norms[self._ruled]
        for left_out in (None if observes_skipped else record.skipped, record.overflow):
            if isinstance(left_out, Tensor):
                context = replace(context, present=context.present & ~left_out)
        if norms.numel():
            if self._foreign:
                norms, context = norms.clone(), _copied(context)
            self._threshold.observe(norms, clipped_norms, context)

    def _asked(self, norms: Tensor, context: StepContext) -> Tensor:
        if not self._foreign:
            return self._threshold.thresholds(norms, context)
        # What a user's own threshold may write to is its own.
        found = self._threshold.thresholds(norms.clone(), _copied(context))
        return _checked(self._threshold, found, norms)

    def follow_labels(self) -> None:
        """Start the threshold, again whenever there are new labels that it rules."""
        names, limits = self._labels.names, self._labels.group_thresholds
        if names is self._started:
            return
        ruled = [index for index, limit in enumerate(limits) if limit is None]
        dtype = norm_dtype(self._device)
        if len(ruled) < len(names):
            own = [math.inf if limit is None else limit for limit in limits]
            self._own = torch.tensor(own, dtype=dtype, device=self._device)
            self._ruled = torch.tensor(ruled, dtype=torch.int64, device=self._device)
        self._threshold.start(tuple(names[i] for i in ruled), self._device, dtype)
        self._started = names


def _part(context: StepContext, ruled: Tensor) -> StepContext:
    weights = context.weight_norms
    return replace(
        context,
        present=context.present[ruled],
        weight_norms=None if weights is None else weights[ruled],
    )


def _copied(context: StepContext) -> StepContext:
    return replace(context, present=context.present.clone())


def _clipped_norms(record: ClipRecord) -> Tensor:
    """Return the norms after scaling; of a skipped step what scaling would have made of them."""
    scaled = clipped_norms(record.norms, record.coefficients)
    if record.skipped is False:
        return scaled
    held = torch.minimum(record.norms, record.thresholds)
    return held if record.skipped is True else torch.where(record.skipped, held, scaled)


def _checked(threshold: Threshold, found: object, norms: Tensor) -> Tensor:
    """Check what a threshold of the user's own returned; its values only where nothing waits."""
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
    # Where the norm is not finite, another rule decides.
    if host_may_read(found) and not bool(((found >= 0) | ~norms.isfinite()).all()):
        raise ArgumentError(
            f"{name} returned {found.tolist()}: return numbers >= 0, infinity for no limit."
        )
    return found.to(norms.dtype)
