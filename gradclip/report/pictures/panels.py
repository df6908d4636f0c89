"""The panels over steps: norms, thresholds, marks of spikes and skips, losses, clip rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from ..clip_rate import running_clip_rate, window_of
from ..losses import loss_spikes_of
from ..printing import number
from ..run import Run
from .style import (
    BLUE,
    LARGE,
    ORANGE,
    PURPLE,
    TEXT,
    VERMILION,
    extremes,
    log_limits,
    positive,
    set_log_axis,
)

NEAR = 1e3
"""A threshold this many times beyond the norms, or farther, is named instead of shown."""
COLUMNS = 2000
"""Intervals that the steps of a long run are divided into: more than a panel has pixels."""


def norm_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the limits of the norms' axis, the same for all runs, with room for marks."""
    norms = np.concatenate([extremes(positive(run.norms)) for run in runs])
    low, high = (np.nanmin(norms), np.nanmax(norms)) if not np.isnan(norms).all() else (1.0, 1.0)
    with np.errstate(over="ignore"):
        thresholds = np.concatenate([extremes(positive(run.thresholds)) for run in runs])
        near = (thresholds > low / NEAR) & (thresholds < high * NEAR)
    # Marks are at the top, those of norms of 0 at the bottom.
    shown = np.concatenate([norms, np.where(near, thresholds, np.nan)])
    return log_limits(shown, below=0.08, above=0.16)


def draw_norms(axes: Axes, run: Run, limits: tuple[float, float]) -> None:
    """Draw norms before and after clipping, the threshold, and marks at exceptional steps."""
    set_log_axis(axes, "y", *limits)
    _draw_curve(axes, run, positive(run.norms), color=BLUE, label="before clipping")
    changed = np.where(run.clipped_norms != run.norms, positive(run.clipped_norms), np.nan)
    if not np.isnan(changed).all():
        _draw_curve(axes, run, changed, color=ORANGE, linewidth=2.0, label="after clipping")
    _draw_threshold(axes, run, limits)
    for is_marked, height, marker, color, label in (
        (~run.finite, 0.965, "x", VERMILION, "not finite"),
        (run.skipped, 0.915, "v", PURPLE, "skipped"),
        (run.norms == 0, 0.03, "^", "0.35", "norm 0"),
    ):
        _mark(axes, run.steps[is_marked], height, marker, color, label)
    finish(axes)


def loss_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the limits of the losses' axis, the same for all runs, with room for marks.

    Those of a logarithmic axis if all losses are above 0: spikes and the slow fall after them are
    visible then alike.
    """
    losses = np.concatenate([extremes(_finite_losses(run)) for run in runs])
    low, high = (np.nanmin(losses), np.nanmax(losses)) if not np.isnan(losses).all() else (1.0, 1.0)
    if low > 0:
        return log_limits(np.array([low, high]), above=0.3)
    span = (high / 2 - low / 2) * 2 or 1.0  # halved: the difference may overflow
    return max(low - 0.05 * span, -1e307), min(high + 0.3 * span, 1e307)


def draw_losses(axes: Axes, run: Run, limits: tuple[float, float]) -> None:
    """Draw the losses, and marks at those that spike or are not finite."""
    if limits[0] > 0:
        set_log_axis(axes, "y", *limits)
    else:
        axes.set_ylim(*limits)
    if run.losses is not None:
        losses = np.clip(_finite_losses(run), -1e300, 1e300)
        _draw_curve(axes, run, losses, color=BLUE, label="loss")
        for is_marked, height, marker, color, label in (
            (np.isinf(run.losses), 0.94, "x", VERMILION, "not finite"),
            (
                np.isin(run.steps, [each.step for each in loss_spikes_of(run)]),
                0.85,
                "v",
                ORANGE,
                "spike",
            ),
        ):
            _mark(axes, run.steps[is_marked], height, marker, color, label)
    finish(axes)


def _finite_losses(run: Run) -> NDArray[np.float64]:
    """Return the losses with NaN at all others."""
    losses = np.full(len(run), np.nan) if run.losses is None else run.losses
    return np.where(np.isfinite(losses), losses, np.nan)


def _mark(
    axes: Axes, steps: NDArray[np.int64], height: float, marker: str, color: str, label: str
) -> None:
    """Mark some steps at a height of the panel, with their number in the legend."""
    if not len(steps):
        return
    shown = thinned(steps)
    axes.plot(
        shown,
        np.full(len(shown), height),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker=marker,
        markersize=5,
        color=color,
        label=f"{label} ({len(steps):,})",
    )


def _draw_curve(
    axes: Axes,
    run: Run,
    values: NDArray[np.float64],
    *,
    color: str,
    label: str,
    linewidth: float = 1.0,
) -> None:
    """Draw a curve of any length. A value without a neighbour gets a point: no line shows it."""
    curve = envelope(run.steps, values)
    axes.plot(*curve.line, color=color, linewidth=linewidth, label=label)
    if curve.isolated.any():
        steps, heights = curve.steps[curve.isolated], curve.high[curve.isolated]
        axes.plot(steps, heights, color=color, linestyle="none", marker=".", markersize=6)


def _draw_threshold(axes: Axes, run: Run, limits: tuple[float, float]) -> None:
    """Draw the threshold; where it changes within an interval, its lowest and highest value."""
    thresholds = positive(run.thresholds)
    lowest, highest = extremes(thresholds)[[0, -1]]
    if np.isnan(lowest):
        return
    label = "threshold"
    if lowest == highest:
        label += f" {number(float(lowest))}"
    if lowest > limits[1] or highest < limits[0]:
        label += " (above)" if lowest > limits[1] else " (below)"
    curve = envelope(run.steps, thresholds)
    style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}
    axes.plot(curve.steps, curve.high, label=label, **style)
    if not np.array_equal(curve.low, curve.high, equal_nan=True):
        axes.plot(curve.steps, curve.low, label="_", **style)  # "_": not in the legend
    if curve.isolated.any():
        steps, heights = curve.steps[curve.isolated], curve.high[curve.isolated]
        axes.plot(steps, heights, color="black", linestyle="none", marker="_", markersize=12)


def draw_clip_rate(axes: Axes, run: Run) -> None:
    """Draw the share of the last norms that were clipped."""
    window = window_of(run)
    _draw_curve(axes, run, running_clip_rate(run, window), color=BLUE, label="clip rate")
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    last = "step" if window == 1 else f"{window:,} steps"
    axes.set_xlabel(f"step ({len(run):,} logged; clipped: share of the last {last})")
    finish(axes)


def set_steps(axes: Axes, run: Run) -> None:
    """Set the axis of the steps, with a small margin at both ends."""
    first, last = int(run.steps[0]), int(run.steps[-1])
    margin = max(0.5, 0.01 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    count = 6 if last < 10**7 else 3  # long labels need more room
    axes.xaxis.set_major_locator(
        MaxNLocator(count, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def finish(axes: Axes) -> None:
    """Set what all panels have in common: sizes of text, grid, frame."""
    axes.tick_params(labelsize=TEXT)
    axes.xaxis.label.set_fontsize(LARGE)
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# Curves of any length, with no more points than a picture has room for


@dataclass(frozen=True)
class Envelope:
    """The smallest and the largest value in each interval of the steps; NaN in an empty one."""

    steps: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def line(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values of the curve through all of them."""
        if np.array_equal(self.low, self.high, equal_nan=True):
            return self.steps, self.high
        return np.repeat(self.steps, 2), np.column_stack((self.low, self.high)).ravel()

    @property
    def isolated(self) -> NDArray[np.bool_]:
        """True in intervals with a value whose neighbours have none: no line shows them."""
        has_value: NDArray[np.bool_] = np.pad(~np.isnan(self.high), 1)
        return has_value[1:-1] & ~has_value[:-2] & ~has_value[2:]


def envelope(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Envelope:
    """Return a curve as a picture shows it; no spike is lost, however many steps there are.

    Args:
        steps: Indices of the steps, rising.
        values: One value per step; NaN where the curve has a gap.
    """
    positions = steps.astype(np.float64)
    if len(steps) <= 2 * COLUMNS:
        return Envelope(positions, values, values)
    first, last = positions[0], positions[-1]
    columns = np.minimum((positions - first) * (COLUMNS / (last - first)), COLUMNS - 1)
    columns = columns.astype(np.int64)
    begins = np.flatnonzero(np.diff(columns, prepend=-1))
    low, high = np.fmin.reduceat(values, begins), np.fmax.reduceat(values, begins)  # ignore NaN
    middle = first + (columns[begins] + 0.5) * ((last - first) / COLUMNS)
    return Envelope(middle, low, high)


def thinned(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return some of the steps: marks at these look like marks at all of them."""
    if len(steps) <= COLUMNS:
        return steps
    columns = (steps - steps[0]).astype(np.float64) * (COLUMNS / float(steps[-1] - steps[0]))
    begins: NDArray[np.bool_] = np.diff(columns.astype(np.int64), prepend=-1) > 0
    return steps[begins]
