"""What all rules of this package share: a cap, a floor, and how they show themselves."""

from __future__ import annotations

import inspect
from abc import abstractmethod

from torch import Tensor

from ..checks import checked_bound
from ..errors import ArgumentError
from .base import StepContext, Threshold


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
