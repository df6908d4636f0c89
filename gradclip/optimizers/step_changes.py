"""What a step changes on an optimizer for its own duration, and how it was before."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..gradients.held import parameters_of
from .call_stack import step_running

_ABSENT = object()


class StepChanges:
    """Changes for the time of one step; `undo` puts back exactly what was there.

    Args:
        optimizer: The optimizer that steps.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._groups: list[tuple[dict[str, Any], dict[str, tuple[object, object]]]] = []
        self._attributes: dict[str, tuple[object, object]] = {}

    def __bool__(self) -> bool:
        """Whether there is anything to undo."""
        return bool(self._hidden or self._groups or self._attributes)

    def hide_gradients(self) -> None:
        """Let the optimizer find no gradient: it leaves parameters and their state as they are."""
        groups = self.optimizer.param_groups
        for parameter in parameters_of(groups):
            if parameter.grad is not None:
                self._hidden.append((parameter, parameter.grad))
                parameter.grad = None
        # Some optimizers count their steps here, also without a gradient. Learning rates are
        # others' business.
        self._groups = [(g, {k: _kept(v) for k, v in g.items() if k != "lr"}) for g in groups]

    def set(self, name: str, value: object) -> None:
        """Set an attribute of the optimizer."""
        earlier = vars(self.optimizer).get(name, _ABSENT)
        self._attributes[name] = (self._attributes.get(name, (earlier,))[0], value)
        setattr(self.optimizer, name, value)

    def undo(self) -> None:
        """Put everything back; the second call does nothing.

        A gradient or attribute that somebody else has set since is theirs, and stays.
        """
        if not self:
            return
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        for group, kept in self._groups:
            for key in group.keys() - kept.keys() - {"lr"}:  # begun in the first step
                del group[key]
            for key, (value, copy) in kept.items():
                if isinstance(value, Tensor) and isinstance(copy, Tensor):
                    value.copy_(copy)
                if copy is not None:
                    group[key] = value
        for name, (earlier, ours) in self._attributes.items():
            if vars(self.optimizer).get(name) is ours:
                if earlier is _ABSENT:
                    delattr(self.optimizer, name)
                else:
                    setattr(self.optimizer, name, earlier)
        self._hidden, self._groups, self._attributes = [], [], {}


def _kept(value: object) -> tuple[object, object]:
    """Return a value of a group, and the number that it is now; None for anything else."""
    if isinstance(value, Tensor):
        return value, value.clone() if value.numel() == 1 else None
    return value, value if isinstance(value, int | float) else None


class GuardedArguments(dict[str, Any]):
    """Keyword arguments of a running step, which undo its changes when the step is over.

    No hook fires after a step that raises, but what it was called with is let go.

    Args:
        arguments: The keyword arguments.
        changes: What the step has changed, or is going to.
    """

    def __init__(self, arguments: dict[str, Any], step_changes: StepChanges) -> None:
        super().__init__(arguments)
        self._step_changes = step_changes

    def __del__(self) -> None:
        """Undo what no hook has undone, unless another hook put its own arguments in place."""
        if self._step_changes and not step_running(self._step_changes.optimizer):
            self._step_changes.undo()
