"""What rules that learn share: state per label, who may enter it, saving, loading, growing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..errors import StateError
from .arithmetic import NumberOrTensor, is_number
from .base import Rule, StepContext


class AdaptiveThreshold(Rule):
    """A rule that learns from the norms of each label; derive your own from it.

    Three methods make a rule: `fresh` says what is kept, `limits` what is allowed, `learn`
    what a step changes. Everything else is done here:

    - The state, a dict of tensors whose dimension 0 is k, is on the norms' device. It is only
      written in place, so that a captured CUDA graph finds it again, and saved with the rule's
      name.
    - A norm enters the state only where it and its clipped norm are finite and the label had a
      gradient.
    - Labels that appear later start fresh; the others go on bit for bit.
    - A skipped step is observed as if it had been scaled instead.

    A rule that goes from a detached clipper to another with the same labels takes along what it
    has learned.

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.
    """

    observes_skipped = True
    observes_zeros: bool = True
    """Whether norms that are 0 after clipping are observed; False for a rule that one such norm
    would hold at 0 for ever."""
    state: Mapping[str, Tensor] = {}  # replaced by `start`, never written
    """What was learned, by name; the tensors are made by `fresh`."""
    _labels: tuple[str, ...] = ()

    # What a rule says

    @abstractmethod
    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state of labels that have seen nothing.

        Args:
            count: k, how many they are.
            device: Where norms will be.
            dtype: Their dtype.

        Returns:
            By name, tensors of shape (k, ...): floating-point ones of ``dtype``, or int64 counts.
            Not negative and finite, as every later state.
        """

    @abstractmethod
    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """Change the state in place, with `put` or by operations of its tensors.

        Args:
            norms: Shape (k,), as measured; 0 where not observed.
            clipped_norms: Shape (k,), after scaling; 0 where not observed.
            observed: Shape (k,), bool: whose state may change; None for all of them.
        """

    def put(self, observed: Tensor | None, **learned: Tensor | float) -> None:
        """Write new values of the state in place, where they are observed.

        Args:
            observed: As `learn` got it.
            learned: By the names in `state`, of the same shapes (k,), or one number for all.
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
        """Bring what is derived from the state up to date, after a start and a loading."""

    # What the clipper calls

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`. Labels that do not begin with the known ones all start fresh."""
        state, known = self.fresh(len(labels), device, dtype), len(self._labels)
        if tuple(labels[:known]) == self._labels:
            for name, learned in self.state.items():
                state[name][:known] = learned
        self.state, self._labels = state, tuple(labels)
        self.rebuild()

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Threshold.thresholds`."""
        limits = super().thresholds(norms, context)
        # The record keeps it, and a tensor of the state changes.
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
        return None if host_may_read(observed) and bool(observed.all()) else observed

    def _usable(self, norms: NumberOrTensor, clipped_norms: NumberOrTensor) -> Any:
        """Return whether norms may be observed; comparisons, which NaN never passes."""
        finite = (norms < math.inf) & (clipped_norms < math.inf)
        return finite if self.observes_zeros else finite & (clipped_norms > 0)


RULE = "rule"
"""The key under which a state names the rule that it was saved from."""
_ENDLESS = 2**53
"""A count that no run reaches, far from where it would overflow."""


def checked_state(rule: str, needed: Mapping[str, Tensor], found: object) -> dict[str, Tensor]:
    """Return the tensors of a saved state, on the device and of the dtype of the present ones.

    Norms that are too large for a narrower dtype become its largest number. Host sync.

    Args:
        rule: Name of the rule's class.
        needed: The present state of the rule.
        found: What the user gave.

    Raises:
        StateError: It is not what ``state_dict`` of such a rule returned.
    """
    if not isinstance(found, Mapping):
        raise _refused(f"The state of the threshold {rule} is a {type(found).__name__}, not a dict")
    if found.get(RULE) != rule:
        raise _refused(f"The threshold is {rule} and the state is of {found.get(RULE, 'no rule')}")
    keys = {RULE, *needed}
    if set(found) != keys:
        names = [sorted(map(str, each)) for each in (found, keys)]
        raise _refused(f"The state of {rule} has the keys {names[0]} and needs {names[1]}")
    return {
        name: _checked(f"{rule}'s {name!r}", like, found[name]) for name, like in needed.items()
    }


def _checked(name: str, like: Tensor, found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.is_meta or found.layout is not torch.strided:
        raise _refused(f"{name} is a {type(found).__name__}, not a dense tensor with values")
    if found.shape != like.shape:
        raise _refused(
            f"{name} has the shape {tuple(found.shape)} and needs {tuple(like.shape)}, which are "
            "the number of norms and, where there is one, the size of the window"
        )
    if _kind(found) != _kind(like):
        raise _refused(f"{name} is of {found.dtype} and needs {like.dtype}")
    counts = not like.is_floating_point()
    if not bool(((found >= 0) & (found < (_ENDLESS if counts else math.inf))).all()):
        raise _refused(f"{name} holds numbers that are negative, not finite or endless counts")
    converted = found.detach().to(like)
    return converted if counts else converted.clamp(max=torch.finfo(like.dtype).max)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "other" if tensor.is_complex() or tensor.dtype is torch.bool else "count"


def _refused(found: str) -> StateError:
    return StateError(
        f"{found}: load the state into a clipper with the labels and the threshold it was saved "
        "from. Nothing was loaded."
    )
