"""Style that all panels share: colours, sizes of text, logarithmic axes, short names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from numpy.typing import ArrayLike, NDArray

# From Okabe and Ito's palette, whose colours differ for the colour-blind as well.
BLUE, ORANGE, VERMILION, PURPLE = "#0072B2", "#E69F00", "#D55E00", "#CC79A7"
NOT_LOGGED = "0.85"

SMALL, TEXT, LARGE = 9, 10, 11
"""Sizes of text in points."""

LEAST_SPAN = 0.5
"""Powers of ten that a logarithmic axis shows at least."""
FARTHEST = 307.0
"""Power of ten at which an axis ends: beyond it, its margins would overflow float64."""
ELLIPSIS = "…"


def positive(values: ArrayLike) -> NDArray[np.float64]:
    """Return the values that a logarithmic axis can show, and NaN in place of the others.

    Values near the ends of float64 are moved a little towards 1, to leave room for a margin.
    """
    numbers = np.asarray(values, dtype=np.float64)
    fits = (numbers > 0) & np.isfinite(numbers)
    return np.where(fits, np.clip(numbers, 1e-300, 1e300), np.nan)


def extremes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest and the largest value without NaN; a single NaN if there is none."""
    numbers = values[~np.isnan(values)]
    return np.array([numbers.min(), numbers.max()]) if len(numbers) else np.array([np.nan])


# Logarithmic axes


def log_limits(
    values: NDArray[np.float64], below: float = 0.05, above: float = 0.05
) -> tuple[float, float]:
    """Return the limits of a logarithmic axis.

    Args:
        values: Values to show, NaN or above 0.
        below: Margin below them, as a share of their range.
        above: Margin above them.
    """
    numbers = extremes(values)
    low, high = (-1.0, 1.0) if np.isnan(numbers[0]) else map(math.log10, (numbers[0], numbers[-1]))
    missing = max(LEAST_SPAN - (high - low), 0.0)
    low, high = low - missing / 2, high + missing / 2
    span = high - low
    return 10 ** max(low - below * span, -FARTHEST), 10 ** min(high + above * span, FARTHEST)


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between two limits: at least two, and not many more than ``most``."""
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
    """Return the label of a tick: a plain number, or a power of ten."""
    return f"{value:g}" if plain else f"$10^{{{round(math.log10(value))}}}$"


def set_log_axis(axes: Axes, which: str, low: float, high: float, least: float = 0.0) -> None:
    """Make an axis logarithmic.

    Args:
        axes: The panel.
        which: "x" or "y".
        low: Beginning of the axis, above 0.
        high: End of the axis.
        least: Lowest tick.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    # matplotlib's own ticks leave a short axis without a label and a long one with too many.
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
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in range(2, 10)]
    return [tick for tick in ticks if max(low, least) <= tick <= high]


# Names


def short_names(names: Sequence[str], most: int, separator: str) -> list[str]:
    """Return names of limited length, which differ wherever the given names differ.

    First the common beginning is cut, up to a separator; then the middle or one end of long names.

    Args:
        names: Names, at least one.
        most: Number of characters of a short name, at least 10.
        separator: The character that divides a name, "." or "/".
    """
    if max(map(len, names)) <= most:
        return [*names]
    distinct = len({*names})
    begin = _common_begin(names, separator) if distinct > 1 else 0
    endings = [ELLIPSIS * bool(begin) + name[begin:] for name in names]
    for head in (most // 2, 0, most // 4, most - 1):
        short = [_shortened(name, most, head) for name in endings]
        if len({*short}) == distinct:
            return short
    # The names differ only where every way of cutting cuts: number them.
    numbers = {name: f"{index}: " for index, name in enumerate(dict.fromkeys(names), 1)}
    return [numbers[name] + _shortened(name, most - len(numbers[name]), 0) for name in names]


def _common_begin(names: Sequence[str], separator: str) -> int:
    """Return the length of the beginning that all names share, up to its last separator."""
    low, high = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low.rfind(separator, 0, same) + 1


def _shortened(name: str, most: int, head: int) -> str:
    """Return the first ``head`` characters of a long name and as many of its last as fit."""
    if len(name) <= most:
        return name
    tail = most - len(ELLIPSIS) - head
    return name[:head] + ELLIPSIS + (name[-tail:] if tail else "")


def drawable(text: str) -> str:
    """Return a text with Python's escapes for characters that the picture's font lacks.

    Line breaks and other control characters are escaped as well.
    """
    characters = _font_characters()
    return "".join(
        character
        if ord(character) in characters
        else character.encode("unicode_escape").decode()  # also of a lone surrogate
        for character in text
    )


@cache
def _font_characters() -> frozenset[int]:
    codes = get_font(findfont("DejaVu Sans")).get_charmap()  # matplotlib brings this font
    return frozenset(code for code in codes if chr(code).isprintable())
