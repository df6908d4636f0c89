"""What the panels of a picture share: colours, sizes of text, logarithmic axes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From Okabe and Ito's palette, which the colour-blind tell apart too.
BLUE, ORANGE, VERMILION, PURPLE = "#0072B2", "#E69F00", "#D55E00", "#CC79A7"
NOT_LOGGED = "0.85"

SMALL, TEXT, LARGE = 9, 10, 11
"""Sizes of text in points."""

LEAST_SPAN = 0.5
"""Powers of ten that a logarithmic axis shows at least."""
FARTHEST = 307.0
"""The power of ten at which an axis ends, so that margins stay numbers."""


def log_limits(
    values: NDArray[np.float64], below: float = 0.05, above: float = 0.05
) -> tuple[float, float]:
    """Return the limits of a logarithmic axis.

    Args:
        values: What it is to show, NaN or above 0.
        below: Room below them, as a share of their range.
        above: Room above them.
    """
    known = values[~np.isnan(values)]
    low, high = (math.log10(known.min()), math.log10(known.max())) if len(known) else (-1.0, 1.0)
    missing = max(LEAST_SPAN - (high - low), 0.0)
    low, high = low - missing / 2, high + missing / 2
    span = high - low
    return 10 ** max(low - below * span, -FARTHEST), 10 ** min(high + above * span, FARTHEST)


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between limits, at least two and not many more than ``most``."""
    first, last = math.log10(low), math.log10(high)
    if last - first >= 2:
        stride = math.ceil((last - first) / most)
        stride = stride if stride <= 10 else 10 * math.ceil(stride / 10)
        powers = range(math.ceil(first / stride), math.floor(last / stride) + 1)
        return [10.0 ** (power * stride) for power in powers]
    digits = (1, 2, 5) if last - first > 0.8 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    powers = range(math.floor(first), math.floor(last) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def log_tick_label(value: float, *, plain: bool) -> str:
    """Return the label of a tick: as a number, or as a power of ten."""
    return f"{value:g}" if plain else f"$10^{{{round(math.log10(value))}}}$"


def set_log_axis(axes: Axes, which: str, low: float, high: float, least: float = 0.0) -> None:
    """Make an axis logarithmic.

    Args:
        axes: Where.
        which: "x" or "y".
        low: Where it begins, above 0.
        high: Where it ends.
        least: The lowest tick.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    ticks = [tick for tick in log_ticks(low, high) if tick >= least]
    plain = (low >= 1e-3 and high <= 1e5) or high < 100 * low
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: log_tick_label(value, plain=plain)))
    axis.set_minor_locator(FixedLocator(_minor_ticks(low, high, least)))
    axis.set_minor_formatter(NullFormatter())


def _minor_ticks(low: float, high: float, least: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    if last - first > 10:
        return []
    found = [digit * 10.0**power for power in range(first, last + 1) for digit in range(2, 10)]
    return [tick for tick in found if max(low, least) <= tick <= high]
