"""The base class of rules that learn from norms: state, accepted norms, saving, new labels.

One norm on the CPU is the usual case. A Python number is ten times as fast as a tensor there, so
the clipper gives this norm to a rule of this package as a number. The rule turns its state into
numbers as well and writes its arithmetic once, with the functions of ``numbers.py``. A rule outside
of this package always gets tensors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..errors import StateError
from .base import Rule, StepContext
from .warm_up import WarmUp


class AdaptiveThreshold(Rule):
    """A rule that learns from the norms of each label; derive your own from it.

    Three methods make a rule: `fresh` returns the state before the first norm, `limits` what the
    state allows, and `learn` changes the state after a step. This class does the rest:

    - The state, a dict of tensors whose dimension 0 is k, is on the norms' device. It is written
      only in place, so that a captured CUDA graph finds it again, and saved with the rule's name.
    - A norm enters the state only if it and its clipped norm are finite and it has a gradient.
    - Labels that are added start fresh; the others go on bit for bit.
    - A skipped step is observed as if it had been scaled instead.
    <!-- test: tests/contracts/rules/test_contract.py; tests/logging/test_replays.py
    -k own_threshold -->

    A rule that is passed from a detached clipper to another one with the same labels keeps what it
    has learned.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k 'one_clipper or passed_on' -->

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.
    """

    observes_skipped = True
    observes_zeros: bool = True
    """True to observe norms that are 0 after clipping; False for a rule that one such norm would
    hold at 0 forever."""
    observes_clipped: bool = True
    """False for a rule that learns from norms as measured and reads no clipped norms."""
    settles_after: int | None = None
    """Number of observed norms that end the warm-up of a label; None for a rule without one."""
    settled_from: float | None = None
    """What ``seen`` of a label is at least then; None for the number itself."""
    settled: bool = False
    """True once the host knows that the warm-up of all labels is over. Always False for one norm
    that is a number."""
    signed: Collection[str] = ()
    """Names in the state of tensors whose numbers may be negative."""
    state: Mapping[str, Tensor] = {}  # shared by all rules before `start`, which replaces it
    """What was learned, by name; the tensors come from `fresh`."""
    _labels: tuple[str, ...] = ()
    _warm_up: WarmUp | None = None
    _infinity = torch.empty(0, device="cpu")
    """Infinity on the norms' device, shape (1,): torch would make one at each use of the number."""

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
            Finite and, but for ``signed`` ones, not negative, as every later state.

        <!-- test: tests/contracts/rules/test_contract.py -k size -->
        """

    @abstractmethod
    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """Change the state in place, with `put` or in-place operations of its tensors.

        Args:
            norms: Shape (k,), as measured; 0 where not observed.
            clipped_norms: Shape (k,), after scaling; 0 where not observed.
            observed: Shape (k,), bool: True where the state may change; None for everywhere.

        <!-- test: tests/contracts/rules/test_contract.py -k unusable -->
        """

    def put(self, observed: Tensor | None, **learned: Tensor | float) -> None:
        """Write values into the state in place, where norms are observed.

        Args:
            observed: The argument of `learn`.
            learned: Values by their names in `state`, of the same shapes (k,), or one number.

        <!-- test: tests/contracts/rules/test_contract.py -k unusable -->
        """
        for name, values in learned.items():
            kept = self.state[name]
            if not isinstance(values, Tensor):
                kept.fill_(values) if observed is None else kept.masked_fill_(observed, values)
            elif observed is None:
                kept.copy_(values)
            else:
                if values.shape != kept.shape or values.dtype != kept.dtype:
                    values = values.to(kept.dtype).expand_as(kept)
                torch.where(observed, values, kept, out=kept)

    def count(self, observed: Tensor | None, counts: Any) -> None:
        """Add 1 to the state's ``counts`` where norms are observed.

        Args:
            observed: The argument of `learn`.
            counts: The counts, or the one as a number.

        <!-- test: tests/contracts/rules/test_contract.py -k unusable -->
        """
        if isinstance(counts, Tensor):
            counts.add_(1 if observed is None else observed)
        else:
            self.state["counts"].fill_(counts + 1)  # in half the time of an addition

    def limits_where(self, limited: Any, limits: Any) -> Any:
        """Return limits where a condition holds, and infinity, which is no limit, elsewhere."""
        if isinstance(limited, Tensor):
            return torch.where(limited, limits, self._infinity)
        return limits if limited else math.inf

    @property
    def seen(self) -> Tensor:
        """What tells whether a warm-up is over, shape (k,): the numbers of observed norms."""
        return self.state["counts"]

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
        self._infinity = torch.full((1,), math.inf, dtype=dtype, device=device)
        self._warm_up, self.settled = None, False
        if self.settles_after is not None and dtype is torch.float64:  # as numbers are rounded
            self._warm_up = WarmUp(self.settles_after, self.settled_from)
        self.rebuild()

    def thresholds(self, norms: Any, context: StepContext) -> Any:
        """See `Rule.thresholds`."""
        if self._warm_up is not None and isinstance(norms, Tensor):
            self.settled = self._warm_up.is_over(self.seen)
        limits: Any = super().thresholds(norms, context)
        if isinstance(limits, float):
            return limits
        # The record keeps what is returned, and a tensor of the state changes at the next step.
        return limits.clone() if any(limits is kept for kept in self.state.values()) else limits

    def observe(self, norms: Any, clipped_norms: Any, context: StepContext) -> None:
        """See `Threshold.observe`; norms are numbers or tensors, as in `thresholds`."""
        if isinstance(norms, float):
            if self._usable(norms, clipped_norms) and context.present.item():
                self.learn(norms, clipped_norms, None)  # type: ignore[arg-type]  # numbers
            return
        observed = self._observed(norms, clipped_norms, context)
        # NaN times anything is NaN, also times 0. The rules of this package choose by `torch.where`
        # instead, and only they are told which norms are usable.
        if observed is not None and context.usable is None:
            norms = torch.where(observed, norms, 0.0)
            clipped_norms = torch.where(observed, clipped_norms, 0.0)
        self.learn(norms, clipped_norms, observed)

    def state_dict(self) -> dict[str, Any]:
        """See `Threshold.state_dict`. The tensors are copies, on the norms' device."""
        return {RULE: type(self).__name__, **{name: t.clone() for name, t in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Threshold.load_state_dict`. Host sync."""
        # Everything is checked before anything is written.
        rule = type(self).__name__
        for name, loaded in checked_state(rule, self.state, state, signed=self.signed).items():
            self.state[name].copy_(loaded)
        if self._warm_up is not None:
            self._warm_up.read(self.seen)
        self.rebuild()

    def _observed(
        self, norms: Tensor, clipped_norms: Tensor, context: StepContext
    ) -> Tensor | None:
        observed = context.usable
        if observed is None:
            observed = context.present & self._usable(norms, clipped_norms)
        elif not self.observes_zeros:
            observed = observed.logical_and(clipped_norms)
        # None spares `put` a torch.where for each tensor; elsewhere the host does not know.
        return None if host_may_read(observed) and bool(observed.all()) else observed

    def _usable(self, norms: Any, clipped_norms: Any) -> Any:
        """Return whether norms may be observed."""
        finite = (norms < math.inf) & (clipped_norms < math.inf)  # False for NaN
        return finite if self.observes_zeros else finite & (clipped_norms > 0)


# Saved states

RULE = "rule"
"""Key of a saved state under which stands the name of its rule."""
_COUNT_LIMIT = 2**53
"""A count that no run reaches, far from an overflow of int64."""


def checked_state(
    rule: str, needed: Mapping[str, Tensor], state: object, *, signed: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a saved state, on the device and of the dtype of the present ones.

    Norms that are too large for a narrower dtype become its largest number. Host sync.

    Args:
        rule: Name of the rule's class.
        needed: The present state of the rule.
        state: The state that the user gave.
        signed: Names of the tensors whose numbers may be negative.

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
        name: _checked(f"{rule}'s {name!r}", like, state[name], signed=name in signed)
        for name, like in needed.items()
    }


def _checked(name: str, like: Tensor, value: object, *, signed: bool) -> Tensor:
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
    magnitude = value.abs() if signed else value
    most = _COUNT_LIMIT if counts else math.inf
    if not bool(((magnitude >= 0) & (magnitude < most)).all()):
        raise _refusal(f"{name} holds numbers that are negative, not finite or endless counts")
    converted = value.detach().to(like)
    # From float64 to float32 a large norm became infinity, which would end the rule's limits.
    if counts:
        return converted
    largest = torch.finfo(like.dtype).max
    return converted.clamp(-largest, largest)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "other" if tensor.is_complex() or tensor.dtype is torch.bool else "count"


def _refusal(found: str) -> StateError:
    return StateError(
        f"{found}: load the state into a clipper with the labels and the threshold it was saved "
        "from. Nothing was loaded."
    )
