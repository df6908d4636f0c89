"""Thresholds that fit given norms: above all of them, or between the usual ones and spikes."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context

import numpy as np
from numpy.typing import NDArray

from .summary import spike_line


def safeguard(norms: NDArray[np.float64]) -> float:
    """Return a threshold that clips none of these norms, nor slightly larger ones."""
    return rounded_up(max(2 * float(np.percentile(norms, 99.9)), float(norms.max())))


def spike_threshold(norms: NDArray[np.float64]) -> float:
    """Return the spike line of these norms: what is above lies far from the usual ones."""
    return rounded_up(spike_line(norms[norms > 0]))


def rounded_up(value: float) -> float:
    """Return a number rounded up to two digits, above 0 and finite."""
    # `:.12g` first: a rounding error in the last bit must not move 2.4 to 2.5.
    rounded = Context(prec=2, rounding=ROUND_CEILING).create_decimal(f"{value:.12g}")
    return min(max(float(rounded), math.ulp(0.0)), 1e308)
