"""A clipper's hold on an optimizer: its hooks, a wrapped closure, and skipped steps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .changes import Changes, GuardedArguments
from .errors import AttachError
from .optimizers import attached
from .records import ClipRecord
from .scaling import (
    delete_marks,
    mark_of,
    marks_of,
    mend_marks,
    overflows_in_passed_scaler,
    running_scaler,
    skips_on_device,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


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
        clip: Callable[[Optimizer, Changes], ClipRecord | None],
        finish: Callable[[Optimizer, ClipRecord], None],
        loaded: Callable[[Optimizer], None],
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._finish = finish
        self._step: _Step | None = None
        # A compiled optimizer.step() calls these as they are and looks at nothing inside.
        self._clip_in_closure = torch.compiler.disable(self._clip_or_skip)
        self._hooks = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
            optimizer.register_load_state_dict_post_hook(loaded),
        ]
        attached.add(optimizer)

    def detach(self) -> None:
        """Remove the hooks and put everything back; the second call does nothing."""
        if self._step is not None:
            self._step.changes.undo()
        for hook in self._hooks:
            hook.remove()
        if self._hooks:
            self._hooks = []
            attached.discard(self._optimizer)

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if self._step is not None:
            if _steps_within_itself(optimizer):
                self._step.depth += 1
                return None
            # The step before raised, so that no hook has put anything back.
            self._step.changes.undo()
            mend_marks(optimizer, self._step.marks)
        self._step = None
        left_out = overflows_in_passed_scaler(optimizer, kwargs)
        step = self._step = _Step(optimizer)
        if left_out:
            return None
        closure = _closure_in(args, kwargs)
        if closure is not None:
            step.closed = step.waits = True
            closure = self._clipped_after(closure, step)
            if len(args) > 1:
                args = (args[0], closure, *args[2:])
            else:
                kwargs = {**kwargs, "closure": closure}
        else:
            self._clip_or_skip(step)
            if not step.changes:
                return None
        return args, GuardedArguments(kwargs, step.changes)

    def _clipped_after(self, closure: Callable[[], Any], step: _Step) -> Callable[[], Any]:
        """Wrap a closure, so that the gradients of every evaluation are clipped."""

        def clipped_closure() -> Any:
            step.changes.undo()
            loss = closure()
            self._clip_in_closure(step)
            return loss

        return clipped_closure

    def _clip_or_skip(self, step: _Step) -> None:
        step.waits = False
        try:
            step.record = self._clip(self._optimizer, step.changes)
        except BaseException:
            self._abandon()
            raise
        if step.record is not None and step.record.skipped is not False:
            _skip(self._optimizer, step.record.skipped, step.changes)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._step
        if step is None:
            return
        if step.depth:
            step.depth -= 1
            return
        step.changes.undo()
        self._step = None
        try:
            self._end(step, _closure_in(args, kwargs))
        except BaseException:
            self._abandon()
            raise

    def _end(self, step: _Step, closure: Callable[[], Any] | None) -> None:
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

    def _abandon(self) -> None:
        """End a step that is not going to be taken."""
        if self._step is not None:
            self._step.changes.undo()
            self._step = None
        if running_scaler() is not None:
            delete_marks(self._optimizer)


class _Step:
    """A step that has begun."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.changes = Changes(optimizer)
        self.marks = marks_of(optimizer)
        self.depth = 0
        """How many calls of ``super().step()`` are running inside it."""
        self.closed = False
        """Whether it was given a closure."""
        self.waits = False
        """Whether its closure has not been evaluated."""
        self.record: ClipRecord | None = None


def _closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    closure: Callable[[], Any] | None = args[1] if len(args) > 1 else kwargs.get("closure")
    return closure


def _skip(optimizer: Optimizer, skipped: bool | Tensor, changes: Changes) -> None:
    """Let the optimizer leave everything as it is. Host sync where it can't on the device."""
    if isinstance(skipped, Tensor) and skips_on_device(optimizer):
        pending = mark_of(optimizer, "found_inf")
        if pending is not None:
            skipped = skipped | (pending > 0)
        # Exactly 0 or 1: Adam multiplies with it.
        changes.set("found_inf", skipped.float())
    elif skipped:
        changes.hide_gradients()


def _steps_within_itself(optimizer: Optimizer) -> bool:
    """Tell whether an earlier ``step`` of the same optimizer is still running, on the stack."""
    hook = sys._getframe(1)
    while hook.f_back is not None and hook.f_code is not _RUN_STEP:
        hook = hook.f_back
    outer = hook.f_back
    while outer is not None:
        if outer.f_code is _RUN_STEP and outer.f_locals["args"][0] is optimizer:
            return True
        outer = outer.f_back
    return False


_RUN_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""What calls hooks around every step of every optimizer."""
