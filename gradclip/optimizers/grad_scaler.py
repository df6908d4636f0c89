"""GradScaler: what scale gradients carry, and the marks it leaves on an optimizer for a step."""

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
"""What GradScaler sets on a fused optimizer before its step and deletes after it."""

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)


def checked_scaler(given: object) -> GradScaler | None:
    """Return what the option ``grad_scaler`` was given.

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
        scaled = stage_of(scaler, optimizer) is OptState.READY
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
    if stage_of(scaler, optimizer) is OptState.READY:
        raise AttachError(
            f"{type(optimizer).__name__} takes grad_scaler in its step and unscales there, after "
            "the clipping: call grad_scaler.unscale_(optimizer) before grad_scaler.step(optimizer)."
        )
    return overflowed(scaler, optimizer)


def _state(scaler: GradScaler, optimizer: Optimizer) -> dict[str, Any] | None:
    """Return what the scaler knows of an optimizer since its last update."""
    return scaler._per_optimizer_states.get(id(optimizer)) if scaler.is_enabled() else None


def stage_of(scaler: GradScaler, optimizer: Optimizer) -> OptState:
    """Return how far the scaler is with an optimizer since its last update."""
    if not scaler.is_enabled():
        return OptState.UNSCALED
    state = _state(scaler, optimizer)
    return OptState.READY if state is None else state["stage"]


def found_inf_of(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    """Return the scaler's verdict on an optimizer, above 0 for an overflow; None before it."""
    state = _state(scaler, optimizer)
    found = list(state["found_inf_per_device"].values()) if state else []
    return sum(f.to(found[0].device) for f in found[1:]) + found[0] if found else None


def overflowed(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Return whether the scaler has found an overflow for an optimizer. Host sync."""
    return is_true(found_inf_of(scaler, optimizer))


def is_true(found: Tensor | None) -> bool:
    """Return whether a verdict is an overflow. Host sync."""
    return found is not None and bool(found)
