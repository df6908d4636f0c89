"""Checks that nothing else in a Lightning ``Trainer`` or module clips the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, AttachError
from ..records.sinks.base import Sink

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The two packages of Lightning, each with a ``Callback`` of its own."""


def refuse_own_clipping(trainer: Any) -> None:
    """Refuse a trainer that clips by itself."""
    for name in ("gradient_clip_val", "gradient_clip_algorithm"):
        option = getattr(trainer, name)
        if option:
            value = getattr(option, "value", option)
            raise ArgumentError(
                f"The Trainer has {name}={value!r} and a GradClipCallback: the gradients "
                "would be clipped twice, and measured after the first time. Remove it from the "
                "Trainer, or remove the callback."
            )


def check_strategy_and_module(strategy: Any, module: Any) -> None:
    """Refuse a strategy that cannot be clipped, and warn of a module that may clip by itself."""
    if strategy.handles_gradient_accumulation:
        raise AttachError(
            f"{type(strategy).__name__} takes the steps in an engine of its own, which calls no "
            "hook of the optimizer: set the clipping in the configuration of that engine and "
            "remove GradClipCallback, or choose another strategy."
        )
    if module.automatic_optimization and _overrides_clipping(type(module)):
        warnings.warn(
            f"{type(module).__name__} overrides configure_gradient_clipping, which Lightning calls "
            "before each step, also without gradient_clip_val: if it clips, it does so before "
            "gradclip measures. Remove it, or remove GradClipCallback.",
            UserWarning,
            stacklevel=3,
        )


def _overrides_clipping(kind: type) -> bool:
    owner = next(base for base in kind.__mro__ if "configure_gradient_clipping" in vars(base))
    return owner.__module__.partition(".")[0] not in {p.partition(".")[0] for p in PACKAGES}


def refuse_joint_scaling(scaler: object) -> None:
    """Refuse a GradScaler for optimizers that share a norm."""
    if scaler is not None:
        raise AttachError(
            "joint=True was given and there is a GradScaler, which Lightning updates after the "
            "step of each optimizer, so that the gradients of the others keep an older scale: use "
            'precision="bf16-mixed", or remove joint=True.'
        )


def refuse_shared_sink(logs: Sequence[object], count: int) -> None:
    """Refuse a sink for several clippers."""
    sink = next((log for log in logs if isinstance(log, Sink)), None)
    if count > 1 and sink is not None:
        raise ArgumentError(
            f"log has {sink!r}, and there are {count} optimizers with a clipper each, whose steps "
            "one sink cannot tell apart: give a directory, True for the trainer's loggers, or "
            "joint=True."
        )


class ManualClippingWatch:
    """Warns of a module that clips by itself between a backward pass and its first step.

    Under manual optimization alone: otherwise Lightning has a method for it, which is checked.

    Args:
        module: The LightningModule.
        scaled: Whether there is a GradScaler, which writes to the gradients itself: nothing can
            be watched then.
    """

    def __init__(self, module: Any, *, scaled: bool) -> None:
        self._module = module
        self._done = scaled or module.automatic_optimization
        self._versions: list[tuple[Tensor, int]] = []

    def after_backward(self) -> None:
        """Remember the versions of the gradients."""
        if not self._done:
            gradients = (parameter.grad for parameter in self._module.parameters())
            self._versions = [(grad, grad._version) for grad in gradients if grad is not None]

    def before_step(self) -> None:
        """Warn if gradients were written since the backward pass; before the first step alone."""
        if any(gradient._version != version for gradient, version in self._versions):
            warnings.warn(
                f"{type(self._module).__name__} writes to its gradients between manual_backward() "
                "and step(): if that is self.clip_gradients(), they are clipped twice, and "
                "measured after the first time. Remove it, or remove GradClipCallback.",
                UserWarning,
                stacklevel=3,
            )
        self._done, self._versions = True, []
