"""A clipper's hold on an optimizer: its step hooks, a wrapped closure, and what it puts back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from .errors import AttachError
from .gradients import parameters_of
from .records import ClipRecord
from .settings import not_available

_attached: WeakSet[Optimizer] = WeakSet()


class Attachment:
    """Calls a clipper once at every step of an optimizer, after the last backward.

    Args:
        optimizer: The optimizer, checked by `check_optimizer`.
        clip: Called when the gradients are complete: before the step, or after each evaluation
            of a closure. Its record says whether the step is to be skipped.
        finish: Called with the last record when the step has been taken or skipped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clip: Callable[[], ClipRecord],
        finish: Callable[[ClipRecord], None],
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._finish = finish
        self._record: ClipRecord | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        _attached.add(optimizer)

    def detach(self) -> None:
        """Remove the hooks and put everything back; the second call does nothing."""
        self.restore()
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            _attached.discard(self._optimizer)

    def restore(self) -> None:
        """Give hidden gradients back, also those that a step left hidden when it raised."""
        for parameter, gradient in self._hidden:
            parameter.grad = gradient
        self._hidden = []

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.restore()
        self._record = None
        _refuse_scaled(optimizer)
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._clipped_after(args[1]), *args[2:]), kwargs
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._clipped_after(kwargs["closure"])}
        self._clip_or_hide()
        return None

    def _clipped_after(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Wrap a closure, so that the gradients of every evaluation are clipped."""

        def clipped_closure() -> Any:
            self.restore()
            loss = closure()
            self._clip_or_hide()
            return loss

        return clipped_closure

    def _clip_or_hide(self) -> None:
        self._record = self._clip()
        if self._record.skipped:
            # An optimizer leaves parameters without a gradient, and their state, as they are.
            for parameter in parameters_of(self._optimizer.param_groups):
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.restore()
        if self._record is not None:
            self._finish(self._record)


def check_optimizer(optimizer: object, *, skips: bool) -> Optimizer:
    """Return the optimizer if it can be clipped through its step hooks.

    Raises:
        AttachError: It can't, for the reason that the message gives.
        NotAvailableError: Several optimizers, or sharded parameters.
    """
    if isinstance(optimizer, list | tuple):
        if len(optimizer) > 1:
            raise not_available("A joint norm over several optimizers", "give one optimizer")
        optimizer = optimizer[0] if optimizer else None
    if not isinstance(optimizer, Optimizer):
        raise AttachError(_not_an_optimizer(optimizer))
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise AttachError(
            f"{type(optimizer).__name__} has no step hooks, as wrappers have not that skip "
            "Optimizer.__init__: give the optimizer that it wraps (often its .optimizer)."
        )
    if optimizer in _attached:
        raise AttachError(
            f"Another GradientClipper is attached to this {type(optimizer).__name__}: detach() "
            "or close() it first, or use the one that is there."
        )
    check_groups(optimizer)
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters_of(optimizer.param_groups)):
        raise not_available(
            "Clipping under FullyShardedDataParallel",
            "call the clip_grad_norm_ of the wrapped module",
        )
    if skips and isinstance(optimizer, LBFGS):
        raise AttachError(
            "LBFGS takes a step without gradients for a converged one, so a step of it cannot be "
            "skipped: choose another policy than 'skip'."
        )
    return optimizer


def check_groups(optimizer: Optimizer) -> None:
    """Refuse what a parameter group asks for and cannot get; cheap enough for every step.

    Raises:
        AttachError: A group whose step is differentiable.
        NotAvailableError: A group with a threshold of its own.
    """
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise AttachError(
                f"{type(optimizer).__name__} has differentiable=True: scaling gradients in place "
                "would falsify what is differentiated through the step. Build it without, or clip "
                "out of place in the loss."
            )
        if "max_norm" in group:
            raise not_available(
                "A max_norm of a parameter group", "take the key 'max_norm' out of the group"
            )


def _refuse_scaled(optimizer: Optimizer) -> None:
    for name in ("grad_scale", "found_inf"):
        if getattr(optimizer, name, None) is not None:
            raise not_available(
                f"Clipping a fused {type(optimizer).__name__} whose gradients GradScaler has not "
                "unscaled",
                "build the optimizer with fused=False",
            )


def _not_an_optimizer(found: object) -> str:
    if found is None:
        return "No optimizer was given: give a torch.optim.Optimizer."
    what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    for name in ("optimizer", "base_optimizer", "optim"):
        if isinstance(getattr(found, name, None), Optimizer):
            return f"Found {what}, which wraps an optimizer: give its .{name}."
    return f"Found {what}: give a torch.optim.Optimizer."
