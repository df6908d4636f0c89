"""What a step changes on an optimizer for its own duration, and how it was before."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .gradients import parameters_of

_ABSENT = object()


class Changes:
    """Changes for the time of one step; `undo` puts back exactly what was there.

    Args:
        optimizer: The optimizer that steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._attributes: dict[str, tuple[object, object]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self._hidden or self._groups or self._attributes)

    def hide_gradients(self) -> None:
        """Let the optimizer find no gradient: it leaves parameters and their state as they are."""
        groups = self._optimizer.param_groups
        for parameter in parameters_of(groups):
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        # Some optimizers count their steps here, also without a gradient. Learning rates are
        # others' business.
        self._groups = [
            (g, {k: v for k, v in g.items() if isinstance(v, int | float) and k != "lr"})
            for g in groups
        ]

    def set(self, name: str, value: object) -> None:
        """Set an attribute of the optimizer."""
        earlier = vars(self._optimizer).get(name, _ABSENT)
        self._attributes[name] = (self._attributes.get(name, (earlier,))[0], value)
        setattr(self._optimizer, name, value)

    def running(self) -> bool:
        """Tell whether a step of the optimizer is on the stack."""
        return step_on_stack(self._optimizer, sys._getframe(1))

    def undo(self) -> None:
        """Put everything back; the second call does nothing.

        A gradient or attribute that somebody else has set since is theirs, and stays.
        """
        if not self:
            return
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        for group, numbers in self._groups:
            group.update(numbers)
        for name, (earlier, ours) in self._attributes.items():
            if vars(self._optimizer).get(name) is ours:
                if earlier is _ABSENT:
                    delattr(self._optimizer, name)
                else:
                    setattr(self._optimizer, name, earlier)
        self._hidden, self._groups, self._attributes = [], [], {}


class GuardedArguments(dict[str, Any]):
    """Keyword arguments of a running step, which undo its changes when the step is over.

    No hook fires after a step that raises, but what it was called with is let go.

    Args:
        arguments: The keyword arguments.
        changes: What the step has changed, or is going to.
    """

    def __init__(self, arguments: dict[str, Any], changes: Changes) -> None:
        super().__init__(arguments)
        self._changes = changes

    def __del__(self) -> None:
        """Undo what no hook has undone, unless another hook put its own arguments in place."""
        if self._changes and not self._changes.running():
            self._changes.undo()


def step_on_stack(optimizer: Optimizer, frame: FrameType | None) -> bool:
    """Tell whether a ``step`` of the optimizer is being run by this frame or by one outside it."""
    while frame is not None:
        if frame.f_code is RUN_STEP and frame.f_locals["args"][0] is optimizer:
            return True
        frame = frame.f_back
    return False


RUN_STEP = Optimizer.profile_hook_step(lambda: None).__code__
"""What calls hooks around every step of every optimizer."""
