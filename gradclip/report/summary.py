"""Summary statistics of a run: quantiles and trend of the norms, spikes, skipped steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.norm_history import DEVIATIONS, FEWEST, WINDOW
from .averages import mean, median, medians
from .losses import LossSummary, losses_summarized
from .run import Run

QUANTILES = (10.0, 50.0, 90.0, 99.0, 99.9)
"""Quantiles of the norms, in percent."""
BLOCK = 10
"""Steps that are compared with the same window, in a tenth of the time of a window per step."""
MOST_SPIKES = 5
"""Number of spikes that a summary lists."""
WINDOWS_AT_ONCE = 1 << 12
"""Windows whose medians are computed together: more would need large copies."""


@dataclass(frozen=True)
class Spike:
    """A norm far above the norms before it."""

    step: int
    norm: float
    usual: float
    """Median of the norms before it."""


@dataclass(frozen=True)
class Summary:
    """The facts of a run; NaN without a finite norm.

    A norm of 0 belongs to a step without gradients and says nothing about the usual norm. The spike
    line, the spikes and the trend ignore such steps.
    """

    name: str
    steps: int
    first_step: int
    last_step: int
    clip_rate: float
    """Share of the finite norms that were clipped, or that would have been if ``observed``."""
    observed: bool
    """True if clipping was only observed."""
    quantiles: dict[float, float]
    """Quantiles of the finite norms, by percent."""
    mean: float
    largest: float
    spike_line: float
    """Median of the norms plus ten median deviations."""
    spikes: int
    """Number of norms more than ten median deviations above the median of the 100 before them."""
    largest_spikes: tuple[Spike, ...]
    """At most five spikes, those furthest above the median before them."""
    nonfinite_steps: int
    skipped_steps: int
    trend: float
    """Median of the last quarter of the norms divided by the median of the first quarter."""
    losses: LossSummary | None
    """The facts of the losses; None if none were logged."""

    @property
    def highest_spike(self) -> float:
        """Ratio of the highest spike to the median before it; NaN without a spike."""
        if not self.largest_spikes:
            return math.nan
        return self.largest_spikes[0].norm / self.largest_spikes[0].usual


def summarized(run: Run) -> Summary:
    """Return the facts of a run."""
    norms = run.norms[run.finite]
    positive_norms = run.norms[run.finite & (run.norms > 0)]
    spikes = spikes_of(run)
    spikes_by_height = sorted(spikes, key=lambda spike: spike.norm / spike.usual, reverse=True)
    levels = np.percentile(norms, QUANTILES) if len(norms) else [math.nan] * len(QUANTILES)
    return Summary(
        name=run.name,
        steps=len(run),
        first_step=int(run.steps[0]),
        last_step=int(run.steps[-1]),
        clip_rate=run.clip_rate,
        observed=run.observed,
        quantiles=dict(zip(QUANTILES, map(float, levels), strict=True)),
        mean=mean(norms),
        largest=float(norms.max()) if len(norms) else math.nan,
        spike_line=spike_line(positive_norms),
        spikes=len(spikes),
        largest_spikes=tuple(spikes_by_height[:MOST_SPIKES]),
        nonfinite_steps=run.nonfinite_steps,
        skipped_steps=run.skipped_steps,
        trend=trend(positive_norms),
        losses=losses_summarized(run),
    )


def spike_line(norms: NDArray[np.float64]) -> float:
    """Return the median of norms above 0 plus ten median deviations; NaN without a norm."""
    level = median(norms)
    return level + DEVIATIONS * median(np.abs(norms - level))


def trend(norms: NDArray[np.float64]) -> float:
    """Return the median of the last quarter of norms above 0 by that of the first.

    NaN if there are less than four.
    """
    quarter = len(norms) // 4
    if not quarter:
        return math.nan
    first, last = median(norms[:quarter]), median(norms[-quarter:])
    return last / first if first else math.nan


def spikes_of(run: Run) -> list[Spike]:
    """Return the norms far above the window before their block, in the order of the steps."""
    has_gradient = run.finite & (run.norms > 0)
    steps, norms = run.steps[has_gradient], run.norms[has_gradient]
    spikes: list[Spike] = []
    for first, windows in _windows(norms):
        levels = medians(windows)
        deviations = medians(np.abs(windows - levels[:, None]))
        with np.errstate(over="ignore"):  # no norm is above a line beyond the end of float64
            lines = levels + DEVIATIONS * deviations
        compared = norms[first : first + len(windows) * BLOCK]
        window_of = np.arange(len(compared)) // BLOCK
        for index in np.flatnonzero(compared > lines[window_of]):
            usual = float(levels[window_of[index]])
            spikes.append(Spike(int(steps[first + index]), float(compared[index]), usual))
    return spikes


def _windows(norms: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the norms before each block of ten: where the first block begins, and a row a block.

    The first blocks have fewer norms before them than a window holds; at least `FEWEST`.
    """
    for first in range(FEWEST, min(WINDOW, len(norms)), BLOCK):
        yield first, norms[None, :first]
    if len(norms) <= WINDOW:
        return
    windows = np.lib.stride_tricks.sliding_window_view(norms[:-1], WINDOW)[::BLOCK]
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        yield WINDOW + begin * BLOCK, windows[begin : begin + WINDOWS_AT_ONCE]
