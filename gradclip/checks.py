"""Checks of numbers that users give, in the same words everywhere."""

from __future__ import annotations

import math
from numbers import Real

from .errors import ArgumentError

ENDLESS = 2**62
"""More than is ever counted."""


def checked_bound(
    name: str,
    value: object,
    *,
    infinite: bool = False,
    none: str = "to measure without clipping",
) -> float:
    """Return ``value`` as a float if it can bound a magnitude: a number >= 0.

    Args:
        name: What the user calls it.
        value: What the user gave.
        infinite: Whether infinity is allowed.
        none: What None would mean, for the error.

    Raises:
        ArgumentError: It is negative, NaN, infinite (unless allowed) or no real number.
    """
    number = _real(name, value, "a number >= 0")
    if number >= 0 and (infinite or number < math.inf):
        return abs(number)  # -0.0 among them
    mend = "a finite number >= 0" + ("" if infinite else f", or None {none}")
    raise ArgumentError(f"{name} is {value!r}: give {mend}.")


def checked_order(value: object) -> float:
    """Return the p of a p-norm as a float: positive, infinity (also as ``"inf"``) included.

    Raises:
        ArgumentError: It is 0, negative, NaN or no real number.
    """
    number = math.inf if value == "inf" else _real("norm_type", value, "a number > 0 or inf")
    if number > 0:
        return number
    raise ArgumentError(
        f"norm_type is {value!r}: give a number > 0, or inf for the largest element."
    )


def checked_count(name: str, value: object, least: int = 0) -> int:
    """Return ``value`` if it is a whole number that is large enough, and an int64 can go on from.

    Raises:
        ArgumentError: It is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value < ENDLESS:
        return value
    raise ArgumentError(f"{name} is {value!r}: give a whole number >= {least} and < 2**62.")


def _real(name: str, value: object, needed: str) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(
            f"{name} is {value!r} of type {type(value).__name__}: give {needed} "
            "(of a tensor its float())."
        )
    return float(value)


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
