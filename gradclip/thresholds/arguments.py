"""Checks of the numbers that a rule is made with, in the same words for every rule."""

from __future__ import annotations

import math
from numbers import Real

from ..errors import ArgumentError


def checked_positive(name: str, value: object) -> float:
    """Return ``value`` as a float if it is finite and above 0.

    Raises:
        ArgumentError: It is not.
    """
    number = _number(value)
    if 0 < number < math.inf:
        return number
    raise ArgumentError(f"{name} is {value!r}: give a finite number > 0.")


def checked_decay(value: object) -> float:
    """Return the share of its past that an average keeps at a step, as a float.

    Raises:
        ArgumentError: It is not in [0, 1).
    """
    number = _number(value)
    if 0 <= number < 1:
        return number
    raise ArgumentError(f"decay is {value!r}: give a number >= 0 and < 1, usually above 0.9.")


def checked_percentile(value: object) -> float:
    """Return a percentile as a float.

    Raises:
        ArgumentError: It is not in [0, 100].
    """
    number = _number(value)
    if 0 <= number <= 100:
        return number
    raise ArgumentError(f"percentile is {value!r}: give a number from 0 to 100.")


def _number(value: object) -> float:
    """Return NaN, which no comparison lets pass, for what is no number."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
