"""GradScaler: what scale gradients carry, and the marks it leaves on an optimizer for a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from .errors import ArgumentError, AttachError
from .gradients.held import gradients_held
from .seen import Seen
from .stack import running_scaler

if TYPE_CHECKING:
    from .changes import Changes

MARKS = ("grad_scale", "found_inf")
"""What GradScaler sets on a fused optimizer before its step and deletes after it."""

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def mark_of(optimizer: Optimizer, name: str) -> Tensor | None:
    """Return ``grad_scale`` or ``found_inf`` where the optimizer heeds it, else None."""
    return getattr(optimizer, name, None) if _heeds_marks(optimizer) else None


def skips_on_device(optimizer: Optimizer) -> bool:
    """Tell whether ``found_inf`` leaves parameters and state of this step exactly as they are.

    True for torch's own fused optimizers once their state is there: before that the first step
    makes it, and that of SGD would be uninitialised memory.
    """
    if type(optimizer) not in FUSED or not _heeds_marks(optimizer):
        return False
    stateless = type(optimizer) is torch.optim.SGD
    return all(
        (stateless and not group["momentum"]) or _has_state(optimizer, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


def _heeds_marks(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    state = optimizer.state.get(parameter, {})
    return len(state) > 0 and all(value is not None for value in state.values())


def marks_of(optimizer: Optimizer) -> list[object]:
    """Return what is marked on the optimizer now, None where nothing is."""
    return [vars(optimizer).get(name) for name in MARKS]


def mend_marks(optimizer: Optimizer, left: Sequence[object]) -> None:
    """Remove what a step that raised has left of GradScaler's marks.

    torch leaves them, and multiplies the next scale by the one that was left.

    Args:
        optimizer: The optimizer, at its next step.
        left: Its `marks_of` at the step that raised.
    """
    if not any(mark is not None for mark in left):
        return
    scaler = running_scaler()
    if scaler is None:
        if all(now is then for now, then in zip(marks_of(optimizer), left, strict=True)):
            delete_marks(optimizer)
    elif "grad_scale" in vars(optimizer):
        scaled = _stage(scaler, optimizer) is OptState.READY
        optimizer.grad_scale = scaler._get_scale_async() if scaled else None  # type: ignore[attr-defined]


def delete_marks(optimizer: Optimizer) -> None:
    """Delete the marks, as GradScaler does after a step that did not raise."""
    for name in MARKS:
        vars(optimizer).pop(name, None)


def overflows_in_passed_scaler(optimizer: Optimizer, arguments: dict[str, Any]) -> bool:
    """Tell whether a GradScaler that the step is given leaves the step out.

    That is its old way, in which the optimizer itself unscales during its step. Host sync.

    Raises:
        AttachError: The gradients are still scaled, by an amount that only the optimizer knows.
    """
    scaler = arguments.get("grad_scaler")
    if not isinstance(scaler, GradScaler):
        return False
    if _stage(scaler, optimizer) is OptState.READY:
        raise AttachError(
            f"{type(optimizer).__name__} takes grad_scaler in its step and unscales there, after "
            "the clipping: call grad_scaler.unscale_(optimizer) before grad_scaler.step(optimizer)."
        )
    return _overflowed(scaler, optimizer)


class JointScaling:
    """Brings the gradients of several optimizers to one scale before their norm is taken.

    Args:
        grad_scaler: The GradScaler of all of them; None where the loss is not scaled.
        everywhere: Whether other ranks have gradients of optimizers that have none here.

    Raises:
        ArgumentError: It is something else.
    """

    def __init__(self, grad_scaler: object, *, everywhere: bool = False) -> None:
        if grad_scaler is not None and not isinstance(grad_scaler, GradScaler):
            raise ArgumentError(
                f"grad_scaler is a {type(grad_scaler).__name__}: give the torch.amp.GradScaler "
                "that scales the loss."
            )
        self._given = grad_scaler
        self._everywhere = everywhere
        self._scaler: GradScaler | None = None
        self._early: dict[int, _Early] = {}

    def unscale(
        self, stepping: Optimizer, optimizers: Sequence[Optimizer], changes: Changes
    ) -> None:
        """Unscale the gradients of all optimizers, each once for each update of the scaler.

        Host sync.

        Raises:
            AttachError: They carry scales that differ and can't be brought to one.
        """
        scaler = self._scaler = self._given or running_scaler()
        if self._given is None:
            _refuse_different_scales(scaler, stepping, optimizers)
        elif scaler is not None and scaler.is_enabled() and scaler._scale is not None:
            self._unscale_all(scaler, stepping, optimizers)
            if mark_of(stepping, "grad_scale") is not None:
                changes.set("grad_scale", None)

    def refuse_new(self, optimizer: Optimizer, gradients: Sequence[Tensor]) -> None:
        """Refuse gradients that were computed since they were unscaled early.

        Args:
            optimizer: The optimizer that steps.
            gradients: Those of its gradients that no clipping has covered.

        Raises:
            AttachError: The scaler takes them for unscaled.
        """
        early = self._early.get(id(optimizer))
        if early is not None and not all(map(early.knows, gradients)):
            raise AttachError(
                f"Gradients of {type(optimizer).__name__} were computed after they had been "
                "unscaled for a joint norm, so that GradScaler does not unscale them again: call "
                "grad_scaler.update() after each optimizer's step, or give optimizers with "
                "different losses, as those of a GAN, a clipper each."
            )

    @property
    def states(self) -> object:
        """What the running scaler knows of optimizers since its last update; else None."""
        return None if self._scaler is None else self._scaler._per_optimizer_states

    def overflowed(self, optimizer: Optimizer) -> bool:
        """Tell whether the scaler leaves out the optimizer's step. Host sync, as it has itself."""
        return self._scaler is not None and _overflowed(self._scaler, optimizer)

    def stepped(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer has stepped since the scaler was updated.

        It will not step again before that, and what was added to its gradients is still scaled.
        """
        return self._scaler is not None and _stage(self._scaler, optimizer) is OptState.STEPPED

    def _unscale_all(
        self, scaler: GradScaler, stepping: Optimizer, optimizers: Sequence[Optimizer]
    ) -> None:
        held = {each: gradients_held(each) for each in optimizers}
        self._check(scaler, stepping, held)
        updated = [key for key, early in self._early.items() if early.updated(scaler)]
        for key in updated:
            del self._early[key]
        for optimizer, gradients in held.items():
            asked = gradients or self._everywhere
            if asked and _stage(scaler, optimizer) is OptState.READY:
                scaler.unscale_(optimizer)
                if optimizer is not stepping:
                    self._early[id(optimizer)] = _Early(scaler, optimizer, gradients)

    def _check(
        self, scaler: GradScaler, stepping: Optimizer, held: dict[Optimizer, list[Tensor]]
    ) -> None:
        if _stage(scaler, stepping) is OptState.READY and mark_of(stepping, "grad_scale") is None:
            raise AttachError(
                f"The gradients of {type(stepping).__name__} are still scaled by grad_scaler: "
                "call grad_scaler.step(optimizer) instead of its own step(), or first "
                "grad_scaler.unscale_(optimizer)."
            )
        ids = [id(gradient) for gradients in held.values() for gradient in gradients]
        if len(set(ids)) < len(ids):
            raise AttachError(
                "Two of the optimizers hold the same parameter, whose gradient GradScaler "
                "unscales once for each: give it to one of them only."
            )
        for optimizer, gradients in held.items():
            early = self._early.get(id(optimizer))
            if early is not None and early.mixed(scaler, gradients):
                raise AttachError(
                    f"The gradients of {type(optimizer).__name__} were unscaled for a joint norm, "
                    "and the scaler was updated before it took its step: what was added since has "
                    "another scale. Under a GradScaler step every optimizer, or set its gradients "
                    "to None with zero_grad(), before grad_scaler.update()."
                )


class _Early:
    """Gradients that were unscaled at the step of another optimizer."""

    def __init__(
        self, scaler: GradScaler, optimizer: Optimizer, gradients: Sequence[Tensor]
    ) -> None:
        self._gradients = {id(gradient): Seen(gradient) for gradient in gradients}
        self._optimizer = id(optimizer)
        self._found = _found_inf(scaler, optimizer)
        self._state = scaler._per_optimizer_states[id(optimizer)]

    def updated(self, scaler: GradScaler) -> bool:
        """Tell whether the scaler was updated since."""
        return scaler._per_optimizer_states.get(self._optimizer) is not self._state

    def mixed(self, scaler: GradScaler, gradients: Sequence[Tensor]) -> bool:
        """Tell whether scaled gradients may have been added to them after an update.

        Not where the scaler has left out the optimizer's step, so that they are of no use, nor
        after that step.
        """
        if not self.updated(scaler) or self._state["stage"] is OptState.STEPPED:
            return False
        kept = any(seen.is_of(g) for g in gradients if (seen := self._gradients.get(id(g))))
        return kept and not _is_true(self._found)

    def knows(self, gradient: Tensor) -> bool:
        """Tell whether a gradient is as it was when it was unscaled."""
        seen = self._gradients.get(id(gradient))
        return seen is not None and seen.unchanged(gradient)


def _refuse_different_scales(
    scaler: GradScaler | None, stepping: Optimizer, optimizers: Sequence[Optimizer]
) -> None:
    others = [
        optimizer
        for optimizer in optimizers
        if optimizer is not stepping and gradients_held(optimizer)
    ]
    scaled = scaler is not None and any(_stage(scaler, o) is OptState.READY for o in others)
    if scaled or (others and mark_of(stepping, "grad_scale") is not None):
        raise AttachError(
            "GradScaler has not unscaled the gradients of all the optimizers, so that their scales "
            "differ: give the clipper grad_scaler=, or call grad_scaler.unscale_ for each of them "
            "before the first step."
        )


def _state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what the scaler knows of an optimizer since its last update."""
    return scaler._per_optimizer_states.get(id(optimizer)) if scaler.is_enabled() else None


def _stage(scaler: GradScaler, optimizer: Optimizer) -> OptState:
    if not scaler.is_enabled():
        return OptState.UNSCALED
    state = _state(scaler, optimizer)
    return OptState.READY if state is None else state["stage"]


def _found_inf(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    state = _state(scaler, optimizer)
    found = list(state["found_inf_per_device"].values()) if state else []
    return sum(f.to(found[0].device) for f in found[1:]) + found[0] if found else None


def _overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    return _is_true(_found_inf(scaler, optimizer))


def _is_true(found: Tensor | None) -> bool:
    return found is not None and bool(found)
