"""The protocol of a threshold: how large each norm may be at this step."""

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


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a threshold may know of a step besides the norms."""

    step: int
    """Index of the step, from 0."""
    present: Tensor
    """Shape (k,), bool: which labels had a gradient at all."""
    order: float = 2.0
    """p of the norms, infinity for the largest element."""
    weight_norms: Tensor | None = None
    """Shape (k,): norms of the parameters with a gradient, of the same order; None for a rule
    without ``needs_weights``."""


class Threshold(ABC):
    """A rule for the largest norm allowed, called by the clipper once or twice a step.

    Its state belongs in tensors, so that it stays on the device and loads with
    ``weights_only=True``. No method may wait for a CUDA device.
    """

    needs_weights: bool = False
    """Whether ``context.weight_norms`` is wanted, which costs a reading of the parameters."""
    observes_skipped: bool = False
    """Whether norms of steps that were skipped are observed too, with the clipped norms that
    scaling would have made. Without it what it skips is never followed."""

    capturable: bool = False
    """Whether a captured CUDA graph may repeat what it does: the same operations at every step,
    and a state that is only written in place."""

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Prepare for k norms; may do nothing.

        Called when the clipper is attached, and again when there are more labels: the new ones
        come last and start fresh, the others go on as they are.

        Args:
            labels: The k names, in the order of the norms.
            device: Where norms will be.
            dtype: Their dtype, float64 where the device has it.
        """

    @abstractmethod
    def thresholds(self, norms: Tensor, context: StepContext) -> Tensor:
        """Return the largest allowed norms, called before the gradients are scaled.

        Args:
            norms: Shape (k,), as measured; may hold NaN and infinity.
            context: The step.

        Returns:
            Shape (k,), not negative, infinity for no limit, of the norms' device and dtype. The
            record of the step keeps it: return a new tensor rather than change it later.
        """

    def observe(self, norms: Tensor, clipped_norms: Tensor, context: StepContext) -> None:  # noqa: B027
        """Learn from a step, called once it was taken (or skipped, see ``observes_skipped``).

        May do nothing.

        Only entries that are finite and whose label is in ``context.present`` may enter a state.

        Args:
            norms: Shape (k,), as measured.
            clipped_norms: Shape (k,), after scaling.
            context: The step, without the labels that are not to be observed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a dict of tensors and plain numbers; empty for a rule without any."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned.

        Raises:
            StateError: It does not belong to this rule; nothing was changed.
        """
        if not isinstance(state, Mapping) or state:
            raise StateError(
                f"{type(self).__name__} keeps no state, found {state!r:.200}: "
                "load the state into a clipper with the threshold it was saved from. Nothing was "
                "loaded."
            )


class Rule(Threshold):
    """A threshold that is held between a floor and a cap.

    A rule says in `limits` what it would allow; the threshold is
    ``min(max(limit, floor), cap)``, also as long as a warm-up sets no limit.

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: One of them is negative, NaN, infinite or no number, or they cross.
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
        """See `Threshold.thresholds`."""
        limits = self.limits(norms, context)
        if self.cap is None and self.floor is None:
            return limits
        return limits.clamp(self.floor, self.cap)

    def __repr__(self) -> str:
        """Show the call that makes this rule; cap and floor only where they are given."""
        shown: list[str] = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value, keyword = getattr(self, name, None), parameter.kind is parameter.KEYWORD_ONLY
            if value is not None or not keyword:
                shown.append(f"{name}={value!r}" if shown or keyword else repr(value))
        return f"{type(self).__name__}({', '.join(shown)})"
