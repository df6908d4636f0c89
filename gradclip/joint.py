"""Which gradients are clipped together when an optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .changes import Changes
from .coverage import Coverage
from .engines.base import host_may_read
from .gradients import distinct, gradients_held, gradients_of, parameters_of
from .optimizers import check_groups, refuse_within_backward
from .records import ClipRecord
from .scaling import JointScaling, mark_of
from .scopes import GroupLabels
from .settings import Settings
from .step_gradients import StepGradients


class JointGradients:
    """The gradients of the optimizers that one clipper holds.

    With one optimizer, all of its gradients are clipped at each of its steps. With several, those
    of one backward pass share the norms: at the first step all that are new are clipped, and at
    the steps of the others nothing, unless some of their gradients were computed since.

    Args:
        optimizers: The optimizers.
        grad_scaler: The GradScaler of several optimizers, or None.
        settings: How to measure and what may be written.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], grad_scaler: object, settings: Settings
    ) -> None:
        self.optimizers = optimizers
        self._settings = settings
        self.groups = GroupLabels(optimizers)
        self._scaling = JointScaling(grad_scaler)
        self._coverage = Coverage() if len(optimizers) > 1 else None

    @property
    def groups_of_all(self) -> list[dict[str, Any]]:
        """The parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def device(self) -> torch.device:
        """Where the norms are: with the first parameter."""
        for optimizer in self.optimizers:
            for parameter in parameters_of(optimizer.param_groups):
                return parameter.device
        return torch.device("cpu")

    def at_step(self, stepping: Optimizer, changes: Changes) -> StepGradients | ClipRecord | None:
        """Return what is to be clipped before a step.

        Returns:
            The gradients; or the record of the clipping that has covered them; or None where
            there is nothing to do, as at a step that GradScaler leaves out.

        Raises:
            AttachError: It cannot be clipped rightly now; nothing was written.
            ArgumentError: A group that was added has an impossible threshold.
        """
        refuse_within_backward(stepping)
        for optimizer in self.optimizers:
            check_groups(optimizer)
        self.groups.refresh()
        overflow = mark_of(stepping, "found_inf")
        if overflow is not None:
            overflow = overflow > 0
            if host_may_read(overflow) or self._coverage is not None:
                if overflow:
                    return None
                overflow = None
        if self._coverage is not None:
            return self._of_several(self._coverage, stepping, changes)
        return self._of_one(stepping, overflow)

    def cover(self, gradients: Sequence[Tensor], record: ClipRecord) -> None:
        """Remember what has been clipped, with its record."""
        if self._coverage is not None:
            self._coverage.clipped(gradients, record)

    def cover_stepped(self, optimizer: Optimizer) -> None:
        """Remember the gradients of an optimizer as its step has left them."""
        if self._coverage is not None:
            self._coverage.stepped(optimizer, gradients_held(optimizer))

    def _of_one(self, optimizer: Optimizer, overflow: Tensor | None) -> StepGradients:
        tensors, labels = self._labelled([optimizer])
        scale = mark_of(optimizer, "grad_scale")
        return self._step_gradients(tensors, labels, scale=scale, overflow=overflow)

    def _of_several(
        self, coverage: Coverage, stepping: Optimizer, changes: Changes
    ) -> StepGradients | ClipRecord | None:
        self._scaling.unscale(stepping, self.optimizers, changes)
        own, _ = self._labelled([stepping])
        if not own:
            return self._of_none(stepping)
        covering = [coverage.record_for(stepping, gradient) for gradient in own]
        records = [record for record in covering if record is not None]
        if len(records) == len(own):
            return max(records, key=lambda record: record.step)
        self._scaling.refuse_new(stepping, [g for g in own if not coverage.knows(g)])
        others = [optimizer for optimizer in self.optimizers if optimizer is not stepping]
        overflowed = [each for each in others if self._scaling.overflowed(each)]
        left_out = {*overflowed, *filter(self._scaling.stepped, others)}
        left = [each for each in others if each not in left_out]
        tensors, labels = self._labelled([stepping, *left])
        needed = {id(gradient) for gradient in own}
        places = [
            place
            for place, gradient in enumerate(tensors)
            if id(gradient) in needed or not coverage.knows(gradient)
        ]
        return self._step_gradients(
            [tensors[place] for place in places],
            None if labels is None else [labels[place] for place in places],
            partial=bool(overflowed),
        )

    def _of_none(self, stepping: Optimizer) -> StepGradients | None:
        """Record a step for which nobody has a gradient once, as that of the first optimizer."""
        if any(map(gradients_held, self.optimizers)) or stepping is not self.optimizers[0]:
            return None
        return self._step_gradients([], None)

    def _step_gradients(
        self, tensors: list[Tensor], labels: list[int] | None, **scaling: Any
    ) -> StepGradients:
        count, device = len(self.groups.names), self.device
        return StepGradients(tensors, labels, self._settings, count, device, **scaling)

    def _labelled(self, optimizers: Sequence[Optimizer]) -> tuple[list[Tensor], list[int] | None]:
        """Return the distinct gradients, and the labels where there is more than one."""
        if self.groups.single:
            groups = (group for optimizer in optimizers for group in optimizer.param_groups)
            return gradients_of(parameters_of(groups)), None
        labels: dict[int, int] = {}
        tensors = []
        for optimizer in optimizers:
            rows = self.groups.indices[self.optimizers.index(optimizer)]
            for group, label in zip(optimizer.param_groups, rows, strict=True):
                if label is not None:
                    for gradient in gradients_of(group["params"]):
                        labels.setdefault(id(gradient), label)
                        tensors.append(gradient)
        tensors = distinct(tensors)
        return tensors, [labels[id(gradient)] for gradient in tensors]
