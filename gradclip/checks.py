"""Checks of numeric arguments, with uniform error messages."""

from __future__ import annotations

import math
from numbers import Real

from .errors import ArgumentError

COUNT_LIMIT = 2**62
"""A count that no run reaches: int64 can count on from any smaller one."""


def checked_bound(
    name: str,
    value: object,
    *,
    infinite: bool = False,
    none: str = "to measure without clipping",
) -> float:
    """Return ``value`` as a float if it can bound a magnitude: a number >= 0.

    Args:
        name: Name of the option, for the error.
        value: The value that the user gave.
        infinite: True to allow infinity.
        none: The meaning of None, for the error.

    Raises:
        ArgumentError: It is negative, NaN, infinite (unless allowed) or not a real number.
    """
    number = _real(name, value, "a number >= 0")
    if number >= 0 and (infinite or number < math.inf):
        return abs(number)  # -0.0 passes the comparison: no sign may reach a coefficient
    remedy = "a finite number >= 0" + ("" if infinite else f", or None {none}")
    raise ArgumentError(f"{name} is {value!r}: give {remedy}.")


def checked_order(value: object) -> float:
    """Return the p of a p-norm as a float: positive, also infinity or ``"inf"``.

    Raises:
        ArgumentError: It is 0, negative, NaN or not a real number.
    """
    number = math.inf if value == "inf" else _real("norm_type", value, "a number > 0 or inf")
    if number > 0:
        return number
    raise ArgumentError(
        f"norm_type is {value!r}: give a number > 0, or inf for the largest element."
    )


def checked_count(name: str, value: object, least: int = 0) -> int:
    """Return ``value`` if it is a whole number from ``least`` to below `COUNT_LIMIT`.

    Raises:
        ArgumentError: It is not.
    """
    # bool is a subclass of int, and True would pass for 1.
    if isinstance(value, int) and not isinstance(value, bool) and least <= value < COUNT_LIMIT:
        return value
    raise ArgumentError(f"{name} is {value!r}: give a whole number >= {least} and < 2**62.")


def checked_positive(name: str, value: object) -> float:
    """Return ``value`` as a float if it is finite and above 0.

    Raises:
        ArgumentError: It is not.
    """
    number = _number_or_nan(value)
    if 0 < number < math.inf:
        return number
    raise ArgumentError(f"{name} is {value!r}: give a finite number > 0.")


def checked_decay(value: object) -> float:
    """Return the weight of the old value in a moving average, as a float.

    Raises:
        ArgumentError: It is not in [0, 1).
    """
    number = _number_or_nan(value)
    if 0 <= number < 1:
        return number
    raise ArgumentError(f"decay is {value!r}: give a number >= 0 and < 1, usually above 0.9.")


def checked_rate(value: object) -> float:
    """Return the largest change of a logarithm at a step, as a float.

    Raises:
        ArgumentError: It is not above 0 and at most 1.
    """
    number = _number_or_nan(value)
    if 0 < number <= 1:
        return number
    raise ArgumentError(f"rate is {value!r}: give a number > 0 and <= 1, usually below 0.3.")


def checked_percentile(value: object) -> float:
    """Return a percentile as a float.

    Raises:
        ArgumentError: It is not in [0, 100].
    """
    number = _number_or_nan(value)
    if 0 <= number <= 100:
        return number
    raise ArgumentError(f"percentile is {value!r}: give a number from 0 to 100.")


def _real(name: str, value: object, needed: str) -> float:
    if type(value) is float:  # nearly every value, in functions that are called at every step
        return value
    # numpy's numbers are registered as Real; a tensor is not, and its float() may wait for a GPU.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(
            f"{name} is {value!r} of type {type(value).__name__}: give {needed} "
            "(of a tensor its float())."
        )
    return float(value)


def _number_or_nan(value: object) -> float:
    """Return ``value`` as a float, or NaN, which passes no comparison, if it is not a number."""
    return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
