"""The loss scale and the overflow flag that a GradScaler keeps for an optimizer.

Of an optimizer that unscales by itself, as torch's fused ones, GradScaler sets the attributes
``grad_scale`` and ``found_inf`` before the step and deletes them after it: the marks of a step. Of
any other, it unscales the gradients and keeps its overflow to itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..errors import ArgumentError, AttachError
from .call_stack import running_scaler

MARKS = ("grad_scale", "found_inf")
"""The attributes that GradScaler sets on an optimizer for the time of a step."""

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
"""The optimizers whose fused steps heed the marks. RMSprop, NAdam, RAdam, Adamax, Adadelta and
Muon ignore them without a word; foreach and plain steps raise on them."""


def checked_scaler(given: object) -> GradScaler | None:
    """Check the clipper's option ``grad_scaler``, and return it.

    Raises:
        ArgumentError: It is neither a GradScaler nor None.
    """
    if given is None or isinstance(given, GradScaler):
        return given
    raise ArgumentError(
        f"grad_scaler is a {type(given).__name__}: give the torch.amp.GradScaler that scales the "
        "loss."
    )


def mark_of(optimizer: Optimizer, name: str) -> Tensor | None:
    """Return ``grad_scale`` or ``found_inf`` if the optimizer heeds it, else None."""
    return getattr(optimizer, name, None) if heeds_marks(optimizer) else None


def marks_of(optimizer: Optimizer) -> tuple[Any, Any]:
    """Return both marks, None for one that is absent."""
    attributes = vars(optimizer)
    return attributes.get("grad_scale"), attributes.get("found_inf")


def mend_marks(optimizer: Optimizer, marks: Sequence[object]) -> None:
    """Remove the marks that are left of a step that raised.

    torch leaves them on the optimizer, and multiplies the scale of the next step by the old one.

    Args:
        optimizer: The optimizer, at its next step.
        marks: Its `marks_of` at the step that raised.
    """
    if not any(mark is not None for mark in marks):
        return
    scaler = running_scaler()
    if scaler is None:
        # Marks that a user has set since stay.
        if all(now is then for now, then in zip(marks_of(optimizer), marks, strict=True)):
            delete_marks(optimizer)
    elif "grad_scale" in vars(optimizer):
        # The running scaler has made a product of the old scale and its own.
        scaled = stage_of(scaler, optimizer) is OptState.READY
        optimizer.grad_scale = scaler._get_scale_async() if scaled else None  # type: ignore[attr-defined]


def delete_marks(optimizer: Optimizer) -> None:
    """Delete the marks, as GradScaler does after a step that did not raise."""
    for name in MARKS:
        vars(optimizer).pop(name, None)


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether ``found_inf`` leaves parameters and state exactly as they are.

    True for torch's own fused optimizers once all their state exists. A first step that is skipped
    makes the state nevertheless, and fused SGD would leave its momentum uninitialised.
    """
    if type(optimizer) not in FUSED or not heeds_marks(optimizer):
        return False
    is_sgd = type(optimizer) is torch.optim.SGD
    return all(
        (is_sgd and not group["momentum"]) or _has_state(optimizer, parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


def heeds_marks(optimizer: Optimizer) -> bool:
    """Return whether the optimizer unscales by itself, and skips the step of an overflow."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _has_state(optimizer: Optimizer, parameter: Tensor) -> bool:
    state = optimizer.state.get(parameter, {})
    return len(state) > 0 and all(value is not None for value in state.values())


def overflows_in_passed_scaler(optimizer: Optimizer, arguments: dict[str, Any]) -> bool:
    """Return whether the GradScaler among the arguments of a step skips that step. Host sync.

    GradScaler used to pass itself to optimizers, which unscale in their own step, and still does
    where ``step`` has a parameter ``grad_scaler``.

    Raises:
        AttachError: The gradients are still scaled, by an amount that only the optimizer knows.
    """
    scaler = arguments.get("grad_scaler")
    if not isinstance(scaler, GradScaler):
        return False
    if stage_of(scaler, optimizer) is OptState.READY:
        raise AttachError(
            f"{type(optimizer).__name__} takes grad_scaler in its step and unscales there, after "
            "the clipping: call grad_scaler.unscale_(optimizer) before grad_scaler.step(optimizer)."
        )
    return overflowed(scaler, optimizer)


def stage_of(scaler: GradScaler, optimizer: Optimizer) -> OptState:
    """Return how far the scaler is with an optimizer since its last update."""
    if not scaler.is_enabled():
        return OptState.UNSCALED
    state = _state(scaler, optimizer)
    return OptState.READY if state is None else state["stage"]


def found_inf_of(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    """Return a 0-d tensor that is above 0 for an overflow; None if the scaler has not looked."""
    state = _state(scaler, optimizer)
    values: list[Tensor] = list(state["found_inf_per_device"].values()) if state else []
    if not values:
        return None
    return sum((value.to(values[0].device) for value in values[1:]), start=values[0])


def overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Return whether the scaler has found an overflow for an optimizer. Host sync."""
    return is_overflow(found_inf_of(scaler, optimizer))


def is_overflow(found_inf: Tensor | None) -> bool:
    """Return whether the value of `found_inf_of` says that there is an overflow. Host sync."""
    return found_inf is not None and bool(found_inf)


def _state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the scaler's own record of an optimizer since its last update."""
    return scaler._per_optimizer_states.get(id(optimizer)) if scaler.is_enabled() else None
