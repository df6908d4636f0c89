"""Facts about the losses of a run: how many spiked, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..records.loss_history import ACCURACY, DEVIATIONS, FEWEST, WINDOW
from .run import Run

MOST_SPIKES = 5
"""Number of spikes that a summary lists."""
WINDOWS_AT_ONCE = 1 << 12
"""Windows whose deviations are computed together: more would need large copies."""


@dataclass(frozen=True)
class LossSpike:
    """A loss far above the losses before it."""

    step: int
    loss: float
    usual: float
    """Mean of the losses before it."""


@dataclass(frozen=True)
class LossSummary:
    """The facts of a run's losses. Losses that are not finite count as no spike."""

    steps: int
    """Number of steps with a loss."""
    nonfinite: int
    """Number of losses that are NaN or infinite."""
    last: float | None
    """The last finite loss."""
    spikes: int
    """Number of losses above the mean of the 128 finite ones before them plus six standard
    deviations, from loss number 64 on."""
    spike_rate: float
    """Share of the finite losses that are spikes; 0 without a finite loss."""
    largest_spikes: tuple[LossSpike, ...]
    """At most five spikes, those furthest above the mean before them."""


def losses_summarized(run: Run) -> LossSummary | None:
    """Return the facts of a run's losses; None if no step has one."""
    if run.losses is None:
        return None
    losses = run.losses[np.isfinite(run.losses)]
    found = loss_spikes_of(run)
    by_height = sorted(found, key=lambda spike: spike.loss - spike.usual, reverse=True)
    return LossSummary(
        steps=int((~np.isnan(run.losses)).sum()),
        nonfinite=int(np.isinf(run.losses).sum()),
        last=float(losses[-1]) if len(losses) else None,
        spikes=len(found),
        spike_rate=len(found) / max(len(losses), 1),
        largest_spikes=tuple(by_height[:MOST_SPIKES]),
    )


def loss_spikes_of(run: Run) -> list[LossSpike]:
    """Return the losses far above those before them, in the order of the steps."""
    if run.losses is None:
        return []
    finite = np.isfinite(run.losses)
    steps, losses = run.steps[finite], run.losses[finite]
    is_spike, means = _spikes(losses)
    return [
        LossSpike(int(steps[index]), float(losses[index]), float(means[index]))
        for index in np.flatnonzero(is_spike)
    ]


def _spikes(losses: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which finite losses are spikes, and the mean before each, NaN before the first few.

    As `LossHistory.is_spike` decides.
    """
    is_spike, means = np.zeros(len(losses), dtype=bool), np.full(len(losses), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):  # losses near the end of float64
        for first, windows in _windows(losses):
            here = slice(first, first + len(windows))
            mean, deviation = windows.mean(axis=1), windows.std(axis=1, ddof=1)
            excess = losses[here] - mean
            means[here] = mean
            is_spike[here] = (excess > ACCURACY * abs(mean)) & (excess > DEVIATIONS * deviation)
    return is_spike, means


def _windows(losses: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the losses before each loss: the index of the first of them, and a row for each."""
    for first in range(FEWEST, min(WINDOW, len(losses))):
        yield first, losses[None, :first]
    if len(losses) <= WINDOW:
        return
    windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
    for begin in range(0, len(windows), WINDOWS_AT_ONCE):
        yield WINDOW + begin, windows[begin : begin + WINDOWS_AT_ONCE]
