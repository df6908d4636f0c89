"""A clipper's hold on an optimizer: its hooks, a wrapped closure, and skipped steps."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engines.cuda_graphs import capturing
from ..errors import AttachError
from ..gradients.held import gradients_held, parameters_of
from ..records.record import ClipRecord
from .call_stack import making_state, running_scaler, step_running
from .clipped_already import TensorVersion, version_of
from .closures import Arguments, ClosureFinder
from .grad_scaler import (
    delete_marks,
    mark_of,
    marks_of,
    mend_marks,
    overflows_in_passed_scaler,
    skips_on_device,
)
from .step_changes import GuardedArguments, StepChanges
from .supported import attached


class Attachment:
    """Calls a clipper once at every step of an optimizer, after the last backward.

    Args:
        optimizer: The optimizer, one of those from `clippable`.
        clip: Called when the gradients are complete: before the step, or after each evaluation
            of a closure. Its record says whether the step is to be skipped; None leaves it be.
        finish: Called with the last record when the step has been taken or skipped.
        loaded: Called when the optimizer's state has been loaded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: Callable[[Optimizer, StepChanges], ClipRecord | None],
        finish: Callable[[Optimizer, ClipRecord], None],
        loaded: Callable[[Optimizer], None],
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._finish = finish
        self._step: _Step | None = None
        self._closures = ClosureFinder(optimizer)
        self._inherits = _steps_through_parents(type(optimizer))
        # A compiled optimizer.step() calls these as they are and looks at nothing inside.
        self._clip_in_closure = torch.compiler.disable(self._clip_or_skip)
        after = optimizer.register_step_post_hook(torch.compiler.disable(self._after))
        # Hooks of others are to find everything put back.
        cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(
            after.id, last=False
        )
        self._hooks = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            after,
            optimizer.register_load_state_dict_post_hook(loaded),
        ]
        attached.add(optimizer)

    def detach(self) -> None:
        """Remove the hooks and put everything back; the second call does nothing."""
        if self._step is not None:
            self._step.step_changes.undo()
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._hooks = []
            attached.discard(self._optimizer)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        step = self._step
        if step is not None:
            if step_running(optimizer, outside=1):
                return self._within(step, args, kwargs)
            # The step before raised, so that no hook has put anything back.
            step.step_changes.undo()
            mend_marks(optimizer, step.marks)
        self._step = None
        if making_state():
            return None
        left_out = overflows_in_passed_scaler(optimizer, kwargs)
        step = self._step = _Step(optimizer)
        if left_out:
            return None
        closure = self._closures.find(args, kwargs)
        if closure is not None:
            step.closed = step.waits = True
            args, kwargs = self._closures.replace(args, kwargs, self._clipped_after(closure, step))
        else:
            self._clip_or_skip(step)
            if not step.step_changes:
                return None
        return args, GuardedArguments(kwargs, step.step_changes)

    def _within(
        self, step: _Step, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """Before a step that a running one takes, as through ``super().step()``: clip what is new.

        The closure is wrapped already, and evaluated inside.
        """
        step.within = True
        step.step_changes.undo()
        if step.waits:
            return None
        if step.knows(gradients_held(self._optimizer)):
            self._skip_if_asked(step)
        else:
            self._clip_or_skip(step)
        return (args, GuardedArguments(kwargs, step.step_changes)) if step.step_changes else None

    def _clipped_after(self, closure: Callable[..., Any], step: _Step) -> Callable[..., Any]:
        """Wrap a closure, so that the gradients of every evaluation are clipped."""

        @wraps(closure)
        def clipped_closure(*args: Any, **kwargs: Any) -> Any:
            step.step_changes.undo()
            loss = closure(*args, **kwargs)
            self._clip_in_closure(step)
            return loss

        return clipped_closure

    def _clip_or_skip(self, step: _Step) -> None:
        step.waits = False
        try:
            step.record = self._clip(self._optimizer, step.step_changes)
        except BaseException:
            self._abandon()
            raise
        if self._inherits:
            step.remember(gradients_held(self._optimizer))
        self._skip_if_asked(step)

    def _skip_if_asked(self, step: _Step) -> None:
        """Let the optimizer leave all as it is. Host sync where it can't on the device."""
        skipped = False if step.record is None else step.record.skipped
        if isinstance(skipped, Tensor) and skips_on_device(self._optimizer):
            pending = mark_of(self._optimizer, "found_inf")
            if pending is not None:
                skipped = skipped | (pending > 0)
            # Exactly 0 or 1: Adam multiplies with it.
            step.step_changes.set("found_inf", skipped.float())
        elif isinstance(skipped, Tensor) and capturing():
            raise AttachError(
                f"{type(self._optimizer).__name__} cannot leave out a step on the device, and in a "
                "captured CUDA graph the host cannot: use a fused optimizer (fused=True) that has "
                "taken a step before, or choose another policy than 'skip'."
            )
        elif skipped:
            step.hide_gradients()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None:
            return
        step.step_changes.undo()
        if step.within and step_running(optimizer, outside=1):
            return
        self._step = None
        try:
            self._end(step, self._closures.find(args, kwargs))
        except BaseException:
            self._abandon()
            raise

    def _end(self, step: _Step, closure: Callable[..., Any] | None) -> None:
        name = type(self._optimizer).__name__
        if step.waits:
            raise AttachError(
                f"{name}.step() never called the closure it was given, so that nothing was "
                "clipped before it stepped: call backward() yourself, then step() without a "
                "closure."
            )
        if closure is not None and not step.closed:
            raise AttachError(
                f"A step pre-hook of {name} added a closure after the clipper's hook, so that its "
                "gradients were not clipped: register that hook before attaching the clipper."
            )
        if step.record is not None:
            self._finish(self._optimizer, step.record)
        if step.wrote():
            warnings.warn(
                f"{name} changed parameters in a step that was to be skipped, though they had no "
                "gradient: it cannot be skipped exactly. Choose another policy than 'skip' for it.",
                UserWarning,
                stacklevel=5,
            )

    def _abandon(self) -> None:
        """End a step that is not going to be taken."""
        if self._step is not None:
            self._step.step_changes.undo()
            self._step = None
        if running_scaler() is not None:
            delete_marks(self._optimizer)


class _Step:
    """A step that has begun."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.step_changes = StepChanges(optimizer)
        self.marks = marks_of(optimizer)
        self.within = False
        """Whether it has taken a step of its own, as through ``super().step()``."""
        self.closed = False
        """Whether it was given a closure."""
        self.waits = False
        """Whether its closure has not been evaluated."""
        self.record: ClipRecord | None = None
        self._optimizer = optimizer
        self._clipped: list[TensorVersion] | None = None
        self._parameters: list[tuple[Tensor, int | None]] = []

    def remember(self, gradients: list[Tensor]) -> None:
        """Remember gradients as they are now, clipped."""
        self._clipped = [*map(TensorVersion, gradients)]

    def knows(self, gradients: list[Tensor]) -> bool:
        """Tell whether gradients are those that were clipped, unchanged."""
        if self._clipped is None or len(self._clipped) != len(gradients):
            return False
        return all(
            seen.unchanged(gradient) and not gradient.is_inference()
            for gradient, seen in zip(gradients, self._clipped, strict=True)
        )

    def hide_gradients(self) -> None:
        """Hide the gradients, and remember the parameters as they are."""
        if not self._parameters:
            parameters = parameters_of(self._optimizer.param_groups)
            self._parameters = [(each, version_of(each)) for each in parameters]
        self.step_changes.hide_gradients()

    def wrote(self) -> bool:
        """Tell whether parameters were written although their gradients were hidden."""
        skipped = self.record is not None and self.record.skipped is not False
        return skipped and any(version_of(each) != then for each, then in self._parameters)


def _steps_through_parents(kind: type[Optimizer]) -> bool:
    """Tell whether a class outside torch has a ``step`` that may call one of its parents."""
    owners = [each for each in kind.__mro__ if "step" in vars(each) and each is not Optimizer]
    return len(owners) > 1 and not owners[0].__module__.startswith("torch.optim")
