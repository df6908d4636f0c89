"""Thresholds: rules for how large a norm may be, one rule per module.

``base.py`` has the protocol and a table of the rules. A number given as ``max_norm`` becomes a
`Fixed`, a function becomes a `Schedule`, "auto" an `Auto`; the other rules depend on the gradients
or the weights. A rule without memory derives from `Threshold`, one that learns from
`AdaptiveThreshold`.

Called by: gradients, optimizers, functional, clipper, integrations.
Imports: errors, checks, engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from ..errors import ArgumentError
from .adaptive import AdaptiveThreshold
from .auto import Auto
from .base import StepContext, Threshold
from .fixed import Fixed
from .growth_limit import GrowthLimit
from .mean_deviation import MeanDeviation
from .median_deviation import MedianDeviation
from .moving_average import MovingAverage
from .percentile import Percentile
from .quantile import Quantile
from .relative_to_weights import RelativeToWeights
from .schedule import Schedule
from .zscore import ZScore

AUTO = "auto"
"""The ``max_norm`` that means an `Auto`."""
MaxNorm: TypeAlias = "float | Threshold | Callable[[int], float | None] | Literal['auto'] | None"
"""What a clipper takes as its ``max_norm``."""

__all__ = [
    "AdaptiveThreshold",
    "Auto",
    "Fixed",
    "GrowthLimit",
    "MeanDeviation",
    "MedianDeviation",
    "MovingAverage",
    "Percentile",
    "Quantile",
    "RelativeToWeights",
    "Schedule",
    "StepContext",
    "Threshold",
    "ZScore",
    "threshold_from",
]

RULES = frozenset(
    {
        Auto,
        Fixed,
        GrowthLimit,
        MeanDeviation,
        MedianDeviation,
        MovingAverage,
        Percentile,
        Quantile,
        RelativeToWeights,
        Schedule,
        ZScore,
    }
)
"""The rules of this package; a class derived from one of them is a user's own. The clipper trusts
these: it passes them its own tensors and does not check what they return."""


def threshold_from(max_norm: object) -> Threshold:
    """Return the rule that a user's ``max_norm`` means.

    Raises:
        ArgumentError: It is not a number, a function, a `Threshold`, "auto" or None.

    <!-- test: tests/behaviour/thresholds/test_given.py -->
    """
    if isinstance(max_norm, Threshold):
        return max_norm
    if isinstance(max_norm, type):
        raise ArgumentError(
            f"max_norm is the class {max_norm.__name__} itself: give an instance, "
            f"{max_norm.__name__}(...)."
        )
    if callable(getattr(max_norm, "thresholds", None)):
        raise ArgumentError(
            f"max_norm is a {type(max_norm).__name__}, which is not a Threshold: derive its class "
            "from gradclip.Threshold."
        )
    if callable(max_norm):
        return Schedule(max_norm)
    if isinstance(max_norm, str):
        if max_norm == AUTO:
            return Auto()
        raise ArgumentError(
            f"max_norm is {max_norm!r}: give {AUTO!r}, a finite number >= 0, or a rule of "
            "gradclip.thresholds."
        )
    return Fixed(max_norm)  # type: ignore[arg-type]  # checked there


def measures_only(threshold: Threshold) -> bool:
    """Return whether a rule allows every norm, as ``max_norm=None`` does."""
    return isinstance(threshold, Fixed) and threshold.max_norm is None


def learns(threshold: Threshold) -> bool:
    """Return whether a rule learns from norms."""
    return type(threshold).observe is not Threshold.observe


def is_foreign(threshold: Threshold) -> bool:
    """Return whether a rule is a user's own, whose tensors are copied and checked."""
    return type(threshold) not in RULES
