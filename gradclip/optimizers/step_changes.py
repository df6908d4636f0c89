"""Changes to an optimizer during one step, such as hidden gradients, and their reversal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..gradients.held import parameters_of
from .call_stack import step_running

_Groups = Sequence[tuple[dict[str, Any], dict[str, tuple[object, object]]]]
"""Parameter groups, each with the values to restore, as `_saved` returns them."""
_ABSENT = object()
"""The earlier value of an attribute that did not exist."""


class StepChanges:
    """Changes that last for one step; `undo` restores exactly what was there.

    Args:
        optimizer: The optimizer that steps.
    """

    # Defaults of the class: a usual step changes nothing.
    _hidden: Sequence[tuple[Tensor, Tensor]] = ()
    _groups: _Groups = ()
    _earlier_groups: _Groups = ()
    """The groups before the step, if it may change them before it is known to be skipped."""
    _attributes: Mapping[str, tuple[object, object]] = MappingProxyType({})
    own_factor: float | Tensor | None = None
    """The factor by which the optimizer has scaled the gradients itself in this step; 0-d."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __bool__(self) -> bool:
        """Return whether there is anything to undo."""
        return bool(self._hidden or self._groups or self._attributes)

    def remember_groups(self) -> None:
        """Remember the groups as they are, for a skip that is decided within the step."""
        self._earlier_groups = self._saved_groups()

    def hide_gradients(self) -> None:
        """Skip the step on the host: without gradients, an optimizer changes no parameter."""
        groups, hidden = self.optimizer.param_groups, [*self._hidden]
        for parameter in parameters_of(groups):
            if parameter.grad is not None:
                hidden.append((parameter, parameter.grad))
                parameter.grad = None
        self._hidden = hidden
        self._groups = self._earlier_groups or self._saved_groups()

    def _saved_groups(self) -> _Groups:
        # Some optimizers count steps in their groups, also without gradients. The learning rate is
        # a scheduler's or the user's, who may set it before these changes are undone.
        groups = self.optimizer.param_groups
        return [(g, {k: _saved(v) for k, v in g.items() if k != "lr"}) for g in groups]

    def set(self, name: str, value: object) -> None:
        """Set an attribute of the optimizer."""
        now = vars(self.optimizer).get(name, _ABSENT)
        earlier, _ = self._attributes.get(name, (now, None))
        self._attributes = {**self._attributes, name: (earlier, value)}
        setattr(self.optimizer, name, value)

    def undo(self) -> None:
        """Restore everything; the second call does nothing.

        A gradient or an attribute that somebody else has set since is theirs, and stays.
        """
        if not self:
            return
        for parameter, gradient in self._hidden:
            if parameter.grad is None:
                parameter.grad = gradient
        for group, saved in self._groups:
            for key in group.keys() - saved.keys() - {"lr"}:  # a counter that the step has made
                del group[key]
            for key, (value, copy) in saved.items():
                if isinstance(value, Tensor) and isinstance(copy, Tensor):
                    value.copy_(copy)
                if copy is not None:
                    group[key] = value
        for name, (earlier, ours) in self._attributes.items():
            if vars(self.optimizer).get(name) is ours:
                # GradScaler deletes its attributes after the step, and fails on one that is
                # missing or None: absent must become absent again.
                if earlier is _ABSENT:
                    delattr(self.optimizer, name)
                else:
                    setattr(self.optimizer, name, earlier)
        self._hidden, self._groups, self._attributes = (), (), {}


def _saved(value: object) -> tuple[object, object]:
    """Return a value of a group with a copy of the number that it is, None for anything else."""
    if isinstance(value, Tensor):
        return value, value.clone() if value.numel() == 1 else None
    return value, value if isinstance(value, int | float) else None


class GuardedArguments(dict[str, Any]):
    """Keyword arguments of a step that undo its changes when the step is over.

    torch calls no post-hook after a step that raised. The arguments are all that a pre-hook can
    leave in that step, and are let go when it ends, before the caller sees the error. Wrapping
    ``optimizer.step`` instead would show in schedulers, which wrap it as well, in compiled steps
    and in ``super().step()``.

    Args:
        arguments: The keyword arguments.
        step_changes: The changes that the step has made or is going to make.
    """

    def __init__(self, arguments: dict[str, Any], step_changes: StepChanges) -> None:
        super().__init__(arguments)
        self._step_changes = step_changes

    def __del__(self) -> None:
        """Undo the changes, unless the step goes on with arguments of another hook."""
        if self._step_changes and not step_running(self._step_changes.optimizer):
            self._step_changes.undo()
