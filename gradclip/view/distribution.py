"""How many steps each threshold of three digits would have clipped, counted from every norm."""

from __future__ import annotations

import math

import numpy as np

from ..report.run import Run
from .arrays import Json, packed

PER_DECADE = 900
"""Numbers of three digits in a decade: 1.00, 1.01, ... 9.99."""


def distribution_of(run: Run) -> Json | None:
    """Return the number of finite norms above each threshold of three digits.

    Thresholds begin at a power of ten at or below the smallest norm above 0 and end at one that
    no norm exceeds; threshold number k is ``(100 + k % 900) * 10 ** (decade + k // 900 - 2)``.
    None if no norm is finite and above 0.
    """
    norms = np.sort(run.norms[run.finite & (run.norms > 0)])
    if not len(norms):
        return None
    lowest, highest = _decade_of(norms[0]), _decade_of(norms[-1])
    thresholds = [
        float(f"{digits}e{decade - 2}")
        for decade in range(lowest, highest + 1)
        for digits in range(100, 1000)
    ]
    above = len(norms) - np.searchsorted(norms, thresholds, side="right")
    return {
        "decade": lowest,
        "above": packed(np.append(above, 0)),
        "finite": int(run.finite.sum()),
        "zeros": int((run.norms == 0).sum()),
    }


def _decade_of(norm: float) -> int:
    """Return the largest power of ten that is not above a number."""
    decade = math.floor(math.log10(norm))
    # The logarithm may round up or down at powers of ten; below 1e-323 a threshold is 0.
    while decade > -324 and float(f"1e{decade}") > norm:
        decade -= 1
    while decade < 308 and float(f"1e{decade + 1}") <= norm:
        decade += 1
    return decade
