"""What a step changes on an optimizer for its own duration, and how it was before."""

from __future__ import annotations

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
        # Some optimizers count their steps here, also without a gradient.
        self._groups = [(g, {k: v for k, v in g.items() if _is_number(v)}) for g in groups]

    def set(self, name: str, value: object) -> None:
        """Set an attribute of the optimizer."""
        earlier = vars(self._optimizer).get(name, _ABSENT)
        self._attributes[name] = (self._attributes.get(name, (earlier,))[0], value)
        setattr(self._optimizer, name, value)

    def undo(self) -> None:
        """Put everything back; the second call does nothing.

        An attribute that somebody else has set since is theirs, and stays.
        """
        for parameter, gradient in self._hidden:
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
    """Keyword arguments of a running step, which undo its changes when they go out of use.

    No hook fires after a step that raises, but what it was called with is let go.

    Args:
        arguments: The keyword arguments.
        changes: What the step has changed, or is going to.
    """

    def __init__(self, arguments: dict[str, Any], changes: Changes) -> None:
        super().__init__(arguments)
        self._changes = changes

    def __del__(self) -> None:
        """Undo what no hook has undone."""
        self._changes.undo()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
