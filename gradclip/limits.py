"""The largest norm of every label: the clipper's threshold, beside those of parameter groups."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from .engines import norm_dtype
from .engines.base import host_may_read
from .errors import ArgumentError
from .records import ClipRecord, clipped
from .scopes import SHARED, GroupLabels
from .step_gradients import StepGradients
from .thresholds import StepContext, Threshold


class Limits:
    """Asks a threshold about the norms that it rules, and tells it what became of them.

    Args:
        threshold: The clipper's threshold.
        groups: The labels, with the thresholds of groups that have their own.
        device: Where norms will be.
    """

    def __init__(self, threshold: Threshold, groups: GroupLabels, device: torch.device) -> None:
        self._threshold = threshold
        self._groups = groups
        self._observes = type(threshold).observe is not Threshold.observe
        self._foreign = not type(threshold).__module__.startswith(f"{__package__}.")
        self._context: StepContext | None = None
        threshold.start((SHARED,), device, norm_dtype(device))

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
        present = _flags(gradients.present, norms.device)
        if not self._groups.single:
            norms, present = norms[self._groups.shared], present[self._groups.shared]
        context = StepContext(step, present)
        # The norm of a part of the gradients is no example of what is to be expected.
        self._context = context if self._observes and not gradients.partial else None
        if not norms.numel():
            return self._groups.thresholds(norms)
        ruled = self._threshold.thresholds(norms, context)
        if self._foreign:
            _check(self._threshold, ruled, norms)
        return self._groups.thresholds(ruled)

    def observe(self, record: ClipRecord) -> None:
        """Let the threshold learn from the step that it was asked about, unless it was skipped."""
        context, shared = self._context, self._groups.shared
        if context is None or record.skipped is True or shared.start == record.norms.numel():
            return
        for left_out in (record.skipped, record.overflow):
            if isinstance(left_out, Tensor):
                context = replace(context, present=context.present & ~left_out)
        norms, coefficients = record.norms[shared], record.coefficients[shared]
        self._threshold.observe(norms, clipped(norms, coefficients), context)


def _check(threshold: Threshold, ruled: object, norms: Tensor) -> None:
    """Check what a threshold of the user's own returned; its values only where nothing waits."""
    name = f"{type(threshold).__name__}.thresholds()"
    if not isinstance(ruled, Tensor):
        raise ArgumentError(
            f"{name} returned a {type(ruled).__name__}: return a tensor of shape "
            f"{tuple(norms.shape)}."
        )
    if ruled.shape != norms.shape or ruled.device != norms.device:
        raise ArgumentError(
            f"{name} returned the shape {tuple(ruled.shape)} on {ruled.device}: return one "
            f"threshold for each norm, shape {tuple(norms.shape)} on {norms.device}."
        )
    if host_may_read(ruled) and not all(limit >= 0 for limit in ruled.tolist()):
        raise ArgumentError(
            f"{name} returned {ruled.tolist()}: return numbers >= 0, infinity for no limit."
        )


@lru_cache(maxsize=8)
def _flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)
