"""Rules for the largest norm allowed, one a file.

`Fixed` is what a number given as ``max_norm`` means, `Schedule` what a function means.
"""

from __future__ import annotations

from ..errors import ArgumentError, NotAvailableError
from .base import StepContext, Threshold
from .fixed import Fixed
from .schedule import Schedule

__all__ = ["Fixed", "Schedule", "StepContext", "Threshold", "threshold_from"]

_PLANNED = (
    "GrowthLimit",
    "MeanDeviation",
    "MedianDeviation",
    "MovingAverage",
    "Percentile",
    "RelativeToWeights",
    "ZScore",
)


def threshold_from(max_norm: object) -> Threshold:
    """Return the rule that a user's ``max_norm`` means.

    Raises:
        ArgumentError: It is none of number, function, `Threshold` and None.
    """
    if isinstance(max_norm, Threshold):
        return max_norm
    if isinstance(max_norm, type):
        raise ArgumentError(
            f"max_norm is the class {max_norm.__name__} itself: give an instance, "
            f"{max_norm.__name__}(...)."
        )
    if callable(max_norm):
        return Schedule(max_norm)
    return Fixed(max_norm)  # type: ignore[arg-type]  # checked there


def __getattr__(name: str) -> object:
    if name in _PLANNED:
        raise NotAvailableError(
            f"gradclip.thresholds.{name} is not available in this version of gradclip: "
            "use Fixed, Schedule, or a class of your own derived from Threshold."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
