"""Arithmetic for one norm as a number and for a tensor of norms, so that a rule is written once.

Both give the same bits, since each operation rounds alike, except that torch's square root may be
off by a unit in the last place. A number divided by a tensor would not: torch multiplies by the
reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

NumberOrTensor = TypeVar("NumberOrTensor", float, Tensor)


def numbers_or_tensors(norms: NumberOrTensor, *state: Tensor) -> Sequence[Any]:
    """Return norms and state; the state, of shape (1,), as numbers if the norm is one."""
    return [norms, *(map(Tensor.item, state) if isinstance(norms, float) else state)]


def as_limits(limits: Any, norms: NumberOrTensor) -> NumberOrTensor:
    """Return limits, a number or a tensor, as a number or a tensor like the norms."""
    if isinstance(norms, float) or isinstance(limits, Tensor):
        return limits  # type: ignore[no-any-return]
    return torch.full_like(norms, limits)


def where(condition: Any, chosen: Any, other: Any) -> Any:
    """Return ``chosen`` where the condition holds, else ``other``; both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, other)
    return chosen if condition else other


def scaled(value: Any, factor: float) -> Any:
    """Return ``factor * value``; the value itself for 1, as torch would launch an operator."""
    return value if factor == 1 else factor * value


def or_infinity(value: Any) -> Any:
    """Return numbers above 0 as they are, and infinity for 0."""
    if isinstance(value, Tensor):
        return torch.threshold(value, 0.0, math.inf)
    return value if value > 0 else math.inf


def smaller(one: Any, other: Any) -> Any:
    """Return the smaller of two; any of them if one is NaN."""
    if isinstance(one, Tensor):
        return torch.minimum(one, other)
    return one if one < other else other


def larger(one: Any, other: Any) -> Any:
    """Return the larger of two; any of them if one is NaN."""
    if isinstance(one, Tensor):
        return torch.maximum(one, other)
    return one if one > other else other


def plus_quotient(summand: Any, dividend: Any, divisor: Any) -> Any:
    """Return ``summand + dividend / divisor``; any number where the divisor is 0."""
    if isinstance(divisor, Tensor):
        return torch.addcdiv(summand, dividend, divisor)
    return summand + dividend / divisor if divisor else math.inf


def closeness(one: Any, others: Any) -> Any:
    """Return ``min(one / other, other / one)`` for each other: 1 if equal, 0 if the other is 0.

    Args:
        one: A number above 0, or a tensor.
        others: As many numbers as are wanted, or the rows of a tensor.
    """
    if isinstance(one, Tensor):
        ratios = one / others
        return torch.minimum(ratios, ratios.reciprocal()).unbind()
    ratios = [one / other if other else math.inf for other in others]
    return [ratio if ratio < 1 else 1 / ratio for ratio in ratios]


def as_floats(counts: Any, norms: Any) -> Any:
    """Return counts in the dtype of the norms: torch would make them float32 in a division."""
    return counts.to(norms.dtype) if isinstance(counts, Tensor) else float(counts)


def square_root(value: NumberOrTensor) -> NumberOrTensor:
    """Return the square root of numbers that are not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def clamped(value: Any, *, low: float | None = None, high: float | None = None) -> Any:
    """Return a number or tensor, or the nearest bound; the upper one if the bounds are crossed."""
    if isinstance(value, Tensor):
        return value.clamp(low, high)
    value = value if low is None else max(value, low)
    return value if high is None else min(value, high)
