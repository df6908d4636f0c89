"""Means and medians of norms up to the end of float64, whose sums would overflow."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def mean(norms: NDArray[np.float64]) -> float:
    """Return the mean of finite norms; NaN without one."""
    if not len(norms):
        return math.nan
    largest, exponent = np.frexp(norms.max())
    # Scaled to at most 1 by a power of two, which rounds no number that counts. Long double has the
    # range for the sum as well, but is float64 on some systems.
    scaled = np.ldexp(norms, -exponent).mean()
    return float(np.ldexp(min(scaled, largest), exponent))


def median(norms: NDArray[np.float64]) -> float:
    """Return the median of finite norms; NaN without one."""
    return float(medians(norms)) if len(norms) else math.nan


def medians(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the medians of finite norms over the last dimension, which is not empty."""
    count = rows.shape[-1]
    lower, upper = (count - 1) // 2, count // 2
    ordered = np.partition(rows, (lower, upper))
    low, high = ordered[..., lower], ordered[..., upper]
    return low + (high - low) / 2  # numpy adds both; halves of the smallest numbers would be 0
