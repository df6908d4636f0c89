"""Attaches a clipper to an optimizer, and follows each step from its first hook to its last.

The methods of `Attachment` stand in the order in which a step goes through them.
"""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engines.cuda_graphs import capturing
from ..errors import AttachError
from ..gradients.held import gradients_held, parameters_of
from ..ranks.groups import world_size
from ..records.record import ClipRecord
from .call_stack import count_running_steps, making_state, running_scaler, step_running
from .clipped_already import TensorVersions, versions_of
from .closures import Arguments, ClosureFinder
from .grad_scaler import (
    delete_marks,
    mark_of,
    marks_of,
    mend_marks,
    overflows_in_passed_scaler,
    skips_on_device,
)
from .own_clipping import GradientsBefore
from .parent_steps import count_parent_steps, may_call_parents_step
from .step_changes import GuardedArguments, StepChanges

P = ParamSpec("P")
R = TypeVar("R")


class Attachment:
    """The hooks of a clipper on one optimizer, which clip once at every step.

    Args:
        optimizer: The optimizer, one of those from `clippable`.
        clip: Called when the gradients are complete: before the step, or after each evaluation of
            its closure, with what that returned, else with None. Returns a record, which says
            whether to skip the step, or None if there was nothing to clip.
        finish: Called with the last record after the step was taken or skipped.
        loaded: Called after the optimizer has loaded a state.
        optimizers: All optimizers of the clipper.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: Callable[[Optimizer, StepChanges, object], ClipRecord | None],
        finish: Callable[[Optimizer, ClipRecord], None],
        loaded: Callable[[Optimizer], None],
        optimizers: Sequence[Optimizer],
    ) -> None:
        self.optimizers = optimizers
        self._optimizer = optimizer
        self._clip = clip
        self._finish = finish
        self._running: _RunningStep | None = None
        self._closures = ClosureFinder(optimizer)
        self._may_nest = may_call_parents_step(type(optimizer))
        self._parent_steps = count_parent_steps(type(optimizer)) if self._may_nest else 0
        self._clip_in_closure = torch.compiler.disable(self._clip_or_skip)
        before = optimizer.register_step_pre_hook(uncompiled(self._before))
        after = optimizer.register_step_post_hook(uncompiled(self._after))
        # Before all other post-hooks, which are to find the optimizer restored. The pre-hook comes
        # after the earlier ones, which may still change the gradients.
        cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(
            after.id, last=False
        )
        self._hooks = [before, after, optimizer.register_load_state_dict_post_hook(loaded)]

    @property
    def clipper(self) -> Any:
        """The clipper that is attached."""
        return getattr(self._finish, "__self__", None)

    @property
    def running_record(self) -> ClipRecord | None:
        """The record of the step that is running; None before it is known."""
        return None if self._running is None else self._running.record

    def detach(self) -> None:
        """Remove the hooks and restore the optimizer; the second call does nothing."""
        if self._running is not None:
            self._running.step_changes.undo()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """The step pre-hook: clip now, or wrap the closure to clip after each evaluation.

        Returns None or both kinds of arguments, as torch takes nothing else.
        """
        running = self._running
        if running is not None:
            if step_running(optimizer, outside=1):
                return self._before_nested(running, args, kwargs)
            # torch calls no post-hook after a step that raised: restore what that one has left.
            running.step_changes.undo()
            mend_marks(optimizer, running.marks)
            self._running = None
        if making_state():
            return None
        # The usual step has no argument but the optimizer itself.
        plain = len(args) == 1 and not kwargs
        overflow = not plain and overflows_in_passed_scaler(optimizer, kwargs)
        running = self._running = _RunningStep(optimizer)
        if overflow:
            return None
        closure = None if plain else self._closures.find(args, kwargs)
        # Each evaluation of a closure is clipped, as a search may use it, but where it may first
        # have to be averaged over processes.
        if self._parent_steps and (closure is None or world_size() > 1):
            running.wait_for_parent()
            if closure is None:
                return None
        if closure is None:
            self._clip_or_skip(running)
            if not running.step_changes:
                return None
        else:
            # The gradients of now are stale: the closure will compute those of this step.
            running.has_closure = running.awaits_closure = True
            clipping = self._with_clipping(closure, running)
            args, kwargs = self._closures.replace(args, kwargs, clipping)
        return args, GuardedArguments(kwargs, running.step_changes)

    def _before_nested(
        self, running: _RunningStep, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """The pre-hook inside a running step, which calls ``super().step()``.

        The innermost step clips, as the outer ones may have changed the gradients before. Where
        the code of an outer step did not show that it calls another one, it has clipped already:
        then changed gradients are clipped again, instead of the first time.
        """
        running.has_nested = True
        running.step_changes.undo()
        if count_running_steps(self._optimizer) <= self._parent_steps:
            return None
        running.waits_for_parent = False
        if running.awaits_closure:  # which is wrapped already
            return None
        gradients = gradients_held(self._optimizer)
        if not running.has_clipped(gradients):
            if running.before is not None:
                running.step_changes.own_factor = running.before.factor(gradients)
            self._clip_or_skip(running)
        elif running.record is not None and running.record.skipped is not False:
            self._skip(running, running.record.skipped)
        if not running.step_changes:
            return None
        return args, GuardedArguments(kwargs, running.step_changes)

    def _with_clipping(
        self, closure: Callable[..., Any], running: _RunningStep
    ) -> Callable[..., Any]:
        """Wrap a closure, so that the gradients of every evaluation are clipped."""

        @wraps(closure)
        def clipping_closure(*args: Any, **kwargs: Any) -> Any:
            # The evaluation before may have been one to skip, and has hidden its gradients.
            running.step_changes.undo()
            loss = closure(*args, **kwargs)
            running.awaits_closure, running.returned = False, loss
            if not running.waits_for_parent:
                self._clip_in_closure(running)
            return loss

        return clipping_closure

    def _clip_or_skip(self, running: _RunningStep) -> None:
        """Clip the gradients that are there, and carry out the decision to skip."""
        try:
            running.record = self._clip(self._optimizer, running.step_changes, running.returned)
        except BaseException:
            self._abandon()
            raise
        if self._may_nest:
            running.remember_clipped(gradients_held(self._optimizer))
        if running.record is not None and running.record.skipped is not False:
            self._skip(running, running.record.skipped)

    def _skip(self, running: _RunningStep, skipped: bool | Tensor) -> None:
        """Let the optimizer change nothing if the decision is to skip.

        Host sync where the device alone knows the decision and the optimizer cannot skip there.
        """
        if isinstance(skipped, Tensor) and skips_on_device(self._optimizer):
            # Fused optimizers take the attribute found_inf for an overflow, as GradScaler sets it.
            pending = mark_of(self._optimizer, "found_inf")
            if pending is not None:
                skipped = skipped | (pending > 0)
            # Exactly 0 or 1: Adam takes it off its step count, and 2 would make that -1.
            running.step_changes.set("found_inf", skipped.float())
        elif isinstance(skipped, Tensor) and capturing():
            raise AttachError(
                f"{type(self._optimizer).__name__} cannot skip a step on the device, and in a "
                "captured CUDA graph the host cannot: use a fused optimizer (fused=True) that has "
                "taken a step before, or choose another policy than 'skip'."
            )
        elif skipped:
            running.hide_gradients()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The step post-hook: restore the optimizer, then count and record the step."""
        running = self._running
        if running is None:
            return
        if running.step_changes:
            running.step_changes.undo()
        if running.has_nested and step_running(optimizer, outside=1):
            return  # this was the nested step; the outer one goes on
        self._running = None
        plain = len(args) == 1 and not kwargs
        try:
            self._end(running, None if plain else self._closures.find(args, kwargs))
        except BaseException:
            self._abandon()
            raise

    def _end(self, running: _RunningStep, closure: Callable[..., Any] | None) -> None:
        """Check that everything was clipped, and hand the record over."""
        name = type(self._optimizer).__name__
        if running.awaits_closure:
            raise AttachError(
                f"{name}.step() never called the closure it was given, so that nothing was "
                "clipped before it stepped: call backward() yourself, then step() without a "
                "closure."
            )
        if closure is not None and not running.has_closure:
            raise AttachError(
                f"A step pre-hook of {name} added a closure after the clipper's hook, so that its "
                "gradients were not clipped: register that hook before attaching the clipper."
            )
        if running.waits_for_parent and running.changed_parameters():
            raise AttachError(
                f"{name}.step() has changed parameters without a call of super().step(), which is "
                "in its code and before which its gradients are clipped: let it call "
                "super().step() whenever it changes parameters."
            )
        if running.record is None:
            return
        self._finish(self._optimizer, running.record)
        if running.record.skipped is not False and running.changed_parameters():
            warnings.warn(
                f"{name} changed parameters in a step that was to be skipped, though they had no "
                "gradient: it cannot be skipped exactly. Choose another policy than 'skip' for it.",
                UserWarning,
                stacklevel=5,
            )

    def _abandon(self) -> None:
        """Restore the optimizer after an error, as the step will not end in `_after`."""
        if self._running is not None:
            self._running.step_changes.undo()
            self._running = None
        # GradScaler deletes its marks only after a step that did not raise.
        if running_scaler() is not None:
            delete_marks(self._optimizer)


class _RunningStep:
    """A step that has begun: its changes, its closure and its record so far."""

    # Defaults of the class: a usual step sets the record alone.
    has_nested = False
    """True if it has called the step of a parent class, whose hooks are the same."""
    has_closure = False
    waits_for_parent = False
    """True until the innermost step begins, if the code of the outer ones says that it will."""
    before: GradientsBefore | None = None
    """The gradients before the outer steps have changed them, unless these average them."""
    awaits_closure = False
    """True until the closure was evaluated for the first time."""
    returned: object = None
    """What the closure returned last; None without one."""
    record: ClipRecord | None = None
    _clipped: TensorVersions | None = None
    _parameters: Sequence[Tensor] = ()
    _versions: Sequence[int | None] = ()

    def __init__(self, optimizer: Optimizer) -> None:
        self.step_changes = StepChanges(optimizer)
        self.marks = marks_of(optimizer)
        """GradScaler's marks at the beginning, to recognize them after an error."""
        self._optimizer = optimizer

    def remember_clipped(self, gradients: list[Tensor]) -> None:
        """Remember gradients as the clipping has left them."""
        self._clipped = TensorVersions(gradients)

    def has_clipped(self, gradients: list[Tensor]) -> bool:
        """Return whether these are the gradients that were clipped, unchanged."""
        if self._clipped is None or len(self._clipped) != len(gradients):
            return False
        return all(self._clipped.are_unchanged(gradients))

    def wait_for_parent(self) -> None:
        """Remember parameters and groups as they are before the outer step changes them."""
        self.waits_for_parent = True
        if world_size() == 1:
            self.before = GradientsBefore(gradients_held(self._optimizer))
        self._remember_parameters()
        self.step_changes.remember_groups()

    def hide_gradients(self) -> None:
        """Skip the step by hiding the gradients, and remember the versions of the parameters."""
        self._remember_parameters()
        self.step_changes.hide_gradients()

    def _remember_parameters(self) -> None:
        if not self._parameters:
            self._parameters = [*parameters_of(self._optimizer.param_groups)]
            self._versions = versions_of(self._parameters)

    def changed_parameters(self) -> bool:
        """Return whether a skipped step has written parameters all the same."""
        return bool(self._parameters) and versions_of(self._parameters) != self._versions


def uncompiled(hook: Callable[P, R]) -> Callable[P, R]:
    """Return a hook that ``torch.compile`` neither traces nor compiles.

    ``torch.compile(optimizer.step)`` would trace it, and compile it anew for every step index.
    torch.compiler.disable prevents both and costs 2 us a call, so only a compiled step pays them.
    """
    disabled: Callable[P, R] = torch.compiler.disable(hook)
    frames, decorators = torch._C._dynamo.eval_frame, torch._dynamo.decorators
    # get_eval_frame_callback of torch 2.6 drops a reference at each call, mostly of None, and the
    # process ends when none is left.
    usable = torch.__version__ >= "2.9" and hasattr(frames, "get_eval_frame_callback")
    if not (usable and hasattr(decorators, "skip")):
        return disabled

    @wraps(hook)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        compiled = frames.get_eval_frame_callback() is not None
        return disabled(*args, **kwargs) if compiled else hook(*args, **kwargs)

    decorators.skip(call)
    return call


def attachment_of(optimizer: Optimizer) -> Attachment | None:
    """Return the attachment of the clipper that is attached to the optimizer, if any."""
    hooks = map(inspect.unwrap, optimizer._optimizer_step_pre_hooks.values())
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, Attachment)), None)
