"""Thresholds: how large each norm may be at a step.

A scope says which gradients share a norm, and a rule says how large these norms may be. A rule sees
k norms and returns k thresholds; it never sees the gradients behind a norm, so every rule works
with every scope.

===================  =====================================  ====================================
rule                 threshold                              memory for k norms
===================  =====================================  ====================================
`Fixed`              a number                               none
`Schedule`           a function of the step                 none
`RelativeToWeights`  factor * max(weight norm, eps)         none
`GrowthLimit`        factor * previous clipped norm         k norms
`MovingAverage`      factor * average of clipped norms      k norms, k counts
`ZScore`             mean + z^2 std / z-score               2 k norms, k counts
`MeanDeviation`      mean + factor * standard deviation     k * window norms, k counts (1)
`MedianDeviation`    median + factor * absolute deviation   k * window norms, k counts
`Percentile`         factor * percentile of recent norms    k * (2 window + 1) norms, k counts
`Quantile`           factor * percentile of all norms       k norms
`Auto`               1 to 3 times the level of the norms    5 k norms
===================  =====================================  ====================================

(1) and window losses, with ``loss=True``.

`Threshold` is the protocol, called by the clipper. `Rule` adds a cap and a floor, and
`AdaptiveThreshold` (in ``adaptive.py``) a state that is learned.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_bound
from ..errors import ArgumentError, StateError
from .numbers import clamped


@dataclass(slots=True)  # frozen would take a microsecond of every step
class StepContext:
    """The facts of a step that a rule gets besides the norms.

    <!-- test: tests/behaviour/clipper/test_own_thresholds.py; tests/behaviour/clipper/test_loss.py
    -k rule_sees -->
    """

    step: int
    """Index of the step, from 0."""
    present: Tensor
    """Shape (k,), bool: True for norms with a gradient."""
    order: float = 2.0
    """p of the norms, infinity for the largest element."""
    weight_norms: Tensor | None = None
    """Shape (k,): norms of the parameters behind each norm, of the same order; None for a rule
    without ``needs_weights``."""
    loss: Any = None
    """The loss of the step, 0-d, of the device and dtype of the norms; across ranks the mean over
    those that gave one. None if none was given. It may be NaN or infinite; on a device it is minus
    infinity where no rank gave one, which the host does not know there. To `Threshold.observe` it
    is NaN at a step that GradScaler skips, if only the device knows. On the CPU the rules of this
    package get a number. Reading it raises `AttachError` where ranks would see different losses."""
    usable: Tensor | None = None
    """Shape (k,), bool: True for norms that are finite and have a gradient; None to a rule that is
    not of this package, and on the CPU."""


class Threshold(ABC):
    """A rule for the largest allowed norms, called by the clipper once or twice a step.

    Its state belongs in tensors, so that it stays on the device and loads with
    ``weights_only=True``. No method may wait for a CUDA device.
    <!-- test: tests/contracts/rules/test_contract.py; tests/behaviour/devices/test_waiting.py
    -k no_threshold -->
    """

    needs_weights: bool = False
    """True to get ``context.weight_norms``: the parameters are then read at every step."""
    needs_skip: bool = False
    """True for a rule that answers with a threshold of 0 where a step is to be skipped: it is
    refused with ``exceed="scale"``, which would set the gradients to 0."""
    needs_loss: bool = False
    """True if a step without a loss is an error, which leaves the gradients as they are."""
    observes_skipped: bool = False
    """True to observe the norms of skipped steps too, with the clipped norms that scaling would
    have made. With False a rule never follows the norms that it skips."""

    capturable: bool = False
    """True if a captured CUDA graph may repeat it: the same operations at every step, and a state
    that is written only in place."""

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Prepare for k norms; may do nothing.

        Called when the clipper is attached, and again when labels are added: these come last and
        start fresh, the others go on as they are.
        <!-- test: tests/contracts/rules/test_contract.py -k added_labels -->

        Args:
            labels: The k labels, in the order of the norms.
            device: Device of the norms.
            dtype: Dtype of the norms, float64 where the device has it.
        """

    @abstractmethod
    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """Return the largest allowed norms, called before the gradients are scaled.

        Args:
            norms: Shape (k,), as measured; may hold NaN and infinity.
            context: The step.

        Returns:
            Shape (k,), 0 or more, infinity for no limit, of the norms' device and dtype. The
            record of the step keeps this tensor: return another one at the next step instead of
            changing it.

        <!-- test: tests/behaviour/clipper/test_own_thresholds.py -->
        """

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:  # noqa: B027
        """Learn from a step, called after it was taken (or skipped, see ``observes_skipped``).

        May do nothing. Only norms that are finite and in ``context.present`` may enter a state.
        <!-- test: tests/contracts/rules/test_contract.py -k unusable -->

        Args:
            norms: Shape (k,), as measured.
            clipped_norms: Shape (k,), after scaling.
            context: The step; ``present`` is False for norms that must not be observed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state, a dict of tensors and plain numbers; empty for a rule without any."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned.

        Raises:
            StateError: It does not belong to this rule; nothing was changed.

        <!-- test: tests/contracts/rules/test_contract.py -k rule_without_state -->
        """
        if not isinstance(state, Mapping) or state:
            raise StateError(
                f"{type(self).__name__} keeps no state, found {state!r:.200}: "
                "load the state into a clipper with the threshold it was saved from. Nothing was "
                "loaded."
            )


class Rule(Threshold):
    """A threshold between a floor and a cap.

    A rule returns from `limits` what it allows by itself; the threshold is
    ``min(max(limit, floor), cap)``, also during a warm-up, which sets no limit.

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: One of them is negative, NaN, infinite or not a number, or the floor is
            above the cap.
    """

    capturable = True
    cap: float | None = None
    floor: float | None = None

    def __init__(self, *, cap: float | None = None, floor: float | None = None) -> None:
        if cap is not None:
            self.cap = checked_bound("cap", cap, none="for no cap")
        if floor is not None:
            self.floor = checked_bound("floor", floor, none="for no floor")
        if self.cap is not None and self.floor is not None and self.floor > self.cap:
            raise ArgumentError(
                f"floor is {floor!r} and cap is {cap!r}: give a floor that is not above the cap."
            )

    @abstractmethod
    def limits(self, norms: Tensor, context: StepContext) -> Tensor:
        """Return what the rule allows by itself; arguments and result as in `thresholds`."""

    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Threshold.thresholds`. The rules of this package also take one norm as a number."""
        limits = self.limits(norms, context)
        if self.cap is None and self.floor is None:
            return limits
        return clamped(limits, low=self.floor, high=self.cap)  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        """Return the call that makes this rule, with keywords only where they are given."""
        shown: list[str] = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value, keyword = getattr(self, name, None), parameter.kind is parameter.KEYWORD_ONLY
            if not (keyword and (value is None or value is parameter.default)):
                shown.append(f"{name}={value!r}" if shown or keyword else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"
