"""What the norms of a run were, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.norm_history import DEVIATIONS, FEWEST, WINDOW
from .run import Run

QUANTILES = (10.0, 50.0, 90.0, 99.0, 99.9)
"""In percent."""
BLOCK = 10
"""Steps that are held against the same ones, which takes a tenth of the time."""
MOST_SPIKES = 5
"""Spikes that are named."""


@dataclass(frozen=True)
class Spike:
    """A norm far above those before it."""

    step: int
    norm: float
    usual: float
    """The median of the norms before it."""


@dataclass(frozen=True)
class Summary:
    """The facts of a run; NaN where there is no finite norm.

    Steps without gradients, whose norm is 0, tell nothing of what is usual: the line, spikes and
    trend are those of the others.
    """

    name: str
    steps: int
    first_step: int
    last_step: int
    clip_rate: float
    quantiles: dict[float, float]
    """Of the finite norms, by percent."""
    mean: float
    largest: float
    spike_line: float
    """Median of the norms and ten median deviations."""
    spikes: int
    """How many norms were more than that above the hundred before them."""
    largest_spikes: tuple[Spike, ...]
    """Those furthest above the median before them, at most five."""
    nonfinite_steps: int
    skipped_steps: int
    trend: float
    """Median of the last quarter of the norms, as a multiple of that of the first."""


def summarized(run: Run) -> Summary:
    """Return the facts of a run."""
    norms = run.norms[run.finite]
    has_gradient = run.finite & (run.norms > 0)
    moving = run.norms[has_gradient]
    spikes = _spikes(run.steps[has_gradient], moving)
    spikes_by_height = sorted(spikes, key=lambda spike: spike.norm / spike.usual, reverse=True)
    levels = np.percentile(norms, QUANTILES) if len(norms) else [math.nan] * len(QUANTILES)
    return Summary(
        name=run.name,
        steps=len(run),
        first_step=int(run.steps[0]),
        last_step=int(run.steps[-1]),
        clip_rate=run.clip_rate,
        quantiles=dict(zip(QUANTILES, map(float, levels), strict=True)),
        mean=float(norms.mean(dtype=np.longdouble)) if len(norms) else math.nan,
        largest=float(norms.max()) if len(norms) else math.nan,
        spike_line=_line(moving),
        spikes=len(spikes),
        largest_spikes=tuple(spikes_by_height[:MOST_SPIKES]),
        nonfinite_steps=run.nonfinite_steps,
        skipped_steps=run.skipped_steps,
        trend=_trend(moving),
    )


def _line(norms: NDArray[np.float64]) -> float:
    """Return the median and ten median deviations."""
    if not len(norms):
        return math.nan
    median = np.median(norms)
    return float(median + DEVIATIONS * np.median(np.abs(norms - median)))


def _trend(norms: NDArray[np.float64]) -> float:
    quarter = len(norms) // 4
    if not quarter:
        return math.nan
    first, last = float(np.median(norms[:quarter])), float(np.median(norms[-quarter:]))
    return last / first if first else math.nan


def _spikes(steps: NDArray[np.int64], norms: NDArray[np.float64]) -> list[Spike]:
    """Return the norms far above the hundred before the ten steps they are among, if not fewer."""
    found: list[Spike] = []
    for first, windows in _windows(norms):
        medians = np.median(windows, axis=1)
        lines = medians + DEVIATIONS * np.median(np.abs(windows - medians[:, None]), axis=1)
        own = norms[first : first + len(windows) * BLOCK]
        block = np.arange(len(own)) // BLOCK
        for place in np.flatnonzero(own > lines[block]):
            at = first + int(place)
            usual = float(medians[block[place]])
            found.append(Spike(int(steps[at]), float(norms[at]), usual))
    return found


def _windows(norms: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield what norms are held against: rows for one block each, after where the first begins."""
    for first in range(FEWEST, min(WINDOW, len(norms)), BLOCK):
        yield first, norms[None, :first]
    if len(norms) <= WINDOW:
        return
    windows = np.lib.stride_tricks.sliding_window_view(norms[:-1], WINDOW)[::BLOCK]
    for begin in range(0, len(windows), 1 << 12):  # some at a time, so that copies stay small
        yield WINDOW + begin * BLOCK, windows[begin : begin + (1 << 12)]
