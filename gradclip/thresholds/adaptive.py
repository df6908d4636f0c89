"""The base class of rules that learn from norms: state, accepted norms, saving, new labels.

One norm on the CPU is the usual case. A Python number is ten times as fast as a tensor there,
so a rule turns norms and state into numbers first where that is possible (`numbers_or_tensors`)
and then writes its arithmetic once, for both.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..errors import StateError
from .base import Rule, StepContext

NumberOrTensor = TypeVar("NumberOrTensor", float, Tensor)


class AdaptiveThreshold(Rule):
    """A rule that learns from the norms of each label; derive your own from it.

    Three methods make a rule: `fresh` returns the state before the first norm, `limits` what the
    state allows, and `learn` changes the state after a step. This class does the rest:

    - The state, a dict of tensors whose dimension 0 is k, is on the norms' device. It is written
      only in place, so that a captured CUDA graph finds it again, and saved with the rule's name.
    - A norm enters the state only if it and its clipped norm are finite and it has a gradient.
    - Labels that are added start fresh; the others go on bit for bit.
    - A skipped step is observed as if it had been scaled instead.

    A rule that is passed from a detached clipper to another one with the same labels keeps what it
    has learned.

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.
    """

    observes_skipped = True
    observes_zeros: bool = True
    """True to observe norms that are 0 after clipping; False for a rule that one such norm would
    hold at 0 forever."""
    state: Mapping[str, Tensor] = {}  # shared by all rules before `start`, which replaces it
    """What was learned, by name; the tensors come from `fresh`."""
    _labels: tuple[str, ...] = ()

    # Methods of a rule

    @abstractmethod
    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state of labels before their first norm.

        Args:
            count: k, the number of labels.
            device: Device of the norms.
            dtype: Dtype of the norms.

        Returns:
            By name, tensors of shape (k, ...): floating-point ones of ``dtype``, or int64 counts.
            Not negative and finite, as every later state.
        """

    @abstractmethod
    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """Change the state in place, with `put` or in-place operations of its tensors.

        Args:
            norms: Shape (k,), as measured; 0 where not observed.
            clipped_norms: Shape (k,), after scaling; 0 where not observed.
            observed: Shape (k,), bool: True where the state may change; None for everywhere.
        """

    def put(self, observed: Tensor | None, **learned: Tensor | float) -> None:
        """Write values into the state in place, where norms are observed.

        Args:
            observed: The argument of `learn`.
            learned: Values by their names in `state`, of the same shapes (k,), or one number.
        """
        for name, values in learned.items():
            kept = self.state[name]
            if observed is not None:
                values = torch.where(observed, values, kept)
            if isinstance(values, Tensor):
                kept.copy_(values)
            else:
                kept.fill_(values)

    def rebuild(self) -> None:
        """Update what is derived from the state; called after `start` and `load_state_dict`."""

    # Methods that the clipper calls

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`. All labels start fresh unless the present ones come first."""
        state, count = self.fresh(len(labels), device, dtype), len(self._labels)
        if tuple(labels[:count]) == self._labels:
            for name, learned in self.state.items():
                state[name][:count] = learned
        self.state, self._labels = state, tuple(labels)
        self.rebuild()

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Threshold.thresholds`."""
        limits = super().thresholds(norms, context)
        # The record keeps what is returned, and a tensor of the state changes at the next step.
        return limits.clone() if any(limits is kept for kept in self.state.values()) else limits

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:
        """See `Threshold.observe`."""
        observed = self._observed(norms, clipped_norms, context)
        if observed is not None:  # NaN times anything is NaN, also times 0
            norms = torch.where(observed, norms, 0.0)
            clipped_norms = torch.where(observed, clipped_norms, 0.0)
        self.learn(norms, clipped_norms, observed)

    def state_dict(self) -> dict[str, Any]:
        """See `Threshold.state_dict`. The tensors are copies, on the norms' device."""
        return {RULE: type(self).__name__, **{name: t.clone() for name, t in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Threshold.load_state_dict`. Host sync."""
        # Everything is checked before anything is written.
        for name, loaded in checked_state(type(self).__name__, self.state, state).items():
            self.state[name].copy_(loaded)
        self.rebuild()

    def _observed(
        self, norms: Tensor, clipped_norms: Tensor, context: StepContext
    ) -> Tensor | None:
        if is_number(norms):
            usable = self._usable(norms.item(), clipped_norms.item())
            if usable and context.present.item():
                return None
        observed = context.present & self._usable(norms, clipped_norms)
        # None spares `put` a torch.where for each tensor; elsewhere the host does not know.
        return None if host_may_read(observed) and bool(observed.all()) else observed

    def _usable(self, norms: NumberOrTensor, clipped_norms: NumberOrTensor) -> Any:
        """Return whether norms may be observed."""
        finite = (norms < math.inf) & (clipped_norms < math.inf)  # False for NaN
        return finite if self.observes_zeros else finite & (clipped_norms > 0)


# Arithmetic for a number and for a tensor of shape (k,) alike, with the same bits: each operation
# rounds alike. A number divided by a tensor does not: torch multiplies by the reciprocal.


def is_number(norms: Tensor) -> bool:
    """Return whether this is one norm that the host may read without waiting."""
    return norms.numel() == 1 and host_may_read(norms)


def numbers_or_tensors(norms: Tensor, *state: Tensor) -> Sequence[Any]:
    """Return the tensors, all of shape (k,), as numbers if the host may read the one norm.

    With several norms, or on another device, they are returned as they are.
    """
    if is_number(norms):
        return [tensor.item() for tensor in (norms, *state)]
    return (norms, *state)


def as_limits(limits: Any, norms: Tensor) -> Tensor:
    """Return limits, a number or a tensor, as a tensor like the norms."""
    return limits if isinstance(limits, Tensor) else torch.full_like(norms, limits)


def where(condition: Any, chosen: Any, other: Any) -> Any:
    """Return ``chosen`` where the condition holds, else ``other``; both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, other)
    return chosen if condition else other


def clamped(value: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """Return a value, or the nearest bound."""
    if isinstance(value, Tensor):
        return value.clamp(low, high)
    value = value if high is None else min(value, high)
    return value if low is None else max(value, low)


def as_floats(counts: Any, norms: Tensor) -> Any:
    """Return counts in the dtype of the norms: torch would make them float32 in a division."""
    return counts.to(norms.dtype) if isinstance(counts, Tensor) else float(counts)


def square_root(value: NumberOrTensor) -> NumberOrTensor:
    """Return the square root of numbers that are not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


# Saved states

RULE = "rule"
"""Key of a saved state under which stands the name of its rule."""
_COUNT_LIMIT = 2**53
"""A count that no run reaches, far from an overflow of int64."""


def checked_state(rule: str, needed: Mapping[str, Tensor], state: object) -> dict[str, Tensor]:
    """Return the tensors of a saved state, on the device and of the dtype of the present ones.

    Norms that are too large for a narrower dtype become its largest number. Host sync.

    Args:
        rule: Name of the rule's class.
        needed: The present state of the rule.
        state: The state that the user gave.

    Raises:
        StateError: It is not what ``state_dict`` of such a rule returned.
    """
    if not isinstance(state, Mapping):
        raise _refusal(f"The state of the threshold {rule} is a {type(state).__name__}, not a dict")
    if state.get(RULE) != rule:
        raise _refusal(f"The threshold is {rule} and the state is of {state.get(RULE, 'no rule')}")
    keys = {RULE, *needed}
    if set(state) != keys:
        names = [sorted(map(str, each)) for each in (state, keys)]
        raise _refusal(f"The state of {rule} has the keys {names[0]} and needs {names[1]}")
    return {
        name: _checked(f"{rule}'s {name!r}", like, state[name]) for name, like in needed.items()
    }


def _checked(name: str, like: Tensor, value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        raise _refusal(f"{name} is a {type(value).__name__}, not a dense tensor with values")
    if value.shape != like.shape:
        raise _refusal(
            f"{name} has the shape {tuple(value.shape)} and needs {tuple(like.shape)}, which are "
            "the number of norms and, where there is one, the size of the window"
        )
    if _kind(value) != _kind(like):
        raise _refusal(f"{name} is of {value.dtype} and needs {like.dtype}")
    counts = not like.is_floating_point()
    if not bool(((value >= 0) & (value < (_COUNT_LIMIT if counts else math.inf))).all()):
        raise _refusal(f"{name} holds numbers that are negative, not finite or endless counts")
    converted = value.detach().to(like)
    # From float64 to float32 a large norm became infinity, which would end the rule's limits.
    return converted if counts else converted.clamp(max=torch.finfo(like.dtype).max)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "other" if tensor.is_complex() or tensor.dtype is torch.bool else "count"


def _refusal(found: str) -> StateError:
    return StateError(
        f"{found}: load the state into a clipper with the labels and the threshold it was saved "
        "from. Nothing was loaded."
    )
