"""Panels of a picture over the steps: norms, and how often they were clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..printing import number
from ..run import Run
from .curves import envelope, positive, running_clip_rate, thinned, window_of
from .style import (
    BLUE,
    LARGE,
    ORANGE,
    PURPLE,
    TEXT,
    VERMILION,
    log_limits,
    set_log_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR = 1e3
"""How many times beyond the norms a threshold may be to be shown."""


def norm_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Return the limits of the norms' axis, the same for all runs, with room for marks."""
    norms = np.concatenate([extremes(positive(run.norms)) for run in runs])
    low, high = (np.nanmin(norms), np.nanmax(norms)) if not np.isnan(norms).all() else (1.0, 1.0)
    with np.errstate(over="ignore"):
        limits = np.concatenate([extremes(positive(run.thresholds)) for run in runs])
        near = np.where((limits > low / NEAR) & (limits < high * NEAR), limits, np.nan)
    # Marks are at the top and, of norms that are 0, at the bottom.
    return log_limits(np.concatenate([norms, near]), below=0.08, above=0.16)


def extremes(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest and the largest value; NaN alone where there is none."""
    known = values[~np.isnan(values)]
    return np.array([known.min(), known.max()]) if len(known) else np.array([np.nan])


def draw_norms(axes: Axes, run: Run, limits: tuple[float, float]) -> None:
    """Draw norms before and after clipping, the threshold, and marks for what went wrong."""
    set_log_axis(axes, "y", *limits)
    norms = positive(run.norms)
    _draw_curve(axes, run, norms, color=BLUE, linewidth=1.0, label="before clipping")
    changed = np.where(run.clipped_norms != run.norms, positive(run.clipped_norms), np.nan)
    if not np.isnan(changed).all():
        _draw_curve(axes, run, changed, color=ORANGE, linewidth=2.0, label="after clipping")
    _draw_threshold(axes, run, limits)
    zero = run.norms == 0
    for which, height, marker, color, label in (
        (~run.finite, 0.965, "x", VERMILION, "not finite"),
        (run.skipped, 0.915, "v", PURPLE, "skipped"),
        (zero, 0.03, "^", "0.35", "norm 0"),
    ):
        steps = run.steps[which]
        if len(steps):
            at = thinned(steps)
            axes.plot(
                at,
                np.full(len(at), height),
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                marker=marker,
                markersize=5,
                color=color,
                label=f"{label} ({len(steps):,})",
            )
    finish(axes)


def _draw_curve(
    axes: Axes,
    run: Run,
    values: NDArray[np.float64],
    *,
    color: str,
    label: str,
    linewidth: float = 1.0,
    linestyle: str = "-",
) -> None:
    """Draw a curve of any length, and points where nothing is beside them to draw a line to."""
    shown = envelope(run.steps, values)
    axes.plot(*shown.line, color=color, linewidth=linewidth, linestyle=linestyle, label=label)
    if shown.isolated.any():
        steps, heights = shown.steps[shown.isolated], shown.high[shown.isolated]
        axes.plot(steps, heights, color=color, linestyle="none", marker=".", markersize=6)


def _draw_threshold(axes: Axes, run: Run, limits: tuple[float, float]) -> None:
    """Draw the threshold; of one that changes from step to step, the lowest and the highest."""
    thresholds = positive(run.thresholds)
    found = extremes(thresholds)
    if np.isnan(found[0]):
        return
    label = "threshold"
    if found[0] == found[-1]:
        label += f" {number(float(found[0]))}"
    if found[0] > limits[1] or found[-1] < limits[0]:
        label += " (above)" if found[0] > limits[1] else " (below)"
    shown = envelope(run.steps, thresholds)
    same = np.array_equal(shown.low, shown.high, equal_nan=True)
    for heights, name in ((shown.high, label), (shown.low, "_")):
        if name == label or not same:
            axes.plot(
                shown.steps, heights, color="black", linestyle="--", linewidth=1.2, label=name
            )
    if shown.isolated.any():
        at = shown.isolated
        axes.plot(
            shown.steps[at],
            shown.high[at],
            color="black",
            linestyle="none",
            marker="_",
            markersize=12,
        )


def draw_clip_rate(axes: Axes, run: Run) -> None:
    """Draw which share of the last norms was clipped."""
    from matplotlib.ticker import PercentFormatter

    window = window_of(run)
    rates = running_clip_rate(run, window)
    _draw_curve(axes, run, rates, color=BLUE, label="clip rate")
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    last = "step" if window == 1 else f"{window:,} steps"
    axes.set_xlabel(f"step ({len(run):,} logged; clipped: share of the last {last})")
    finish(axes)


def set_steps(axes: Axes, run: Run) -> None:
    """Set the axis of the steps, with a little room at both ends."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    first, last = int(run.steps[0]), int(run.steps[-1])
    room = max(0.5, 0.01 * (last - first))
    axes.set_xlim(first - room, last + room)
    count = 6 if last < 10**7 else 3
    axes.xaxis.set_major_locator(
        MaxNLocator(count, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def finish(axes: Axes) -> None:
    """Set what all panels have in common."""
    axes.tick_params(labelsize=TEXT)
    axes.xaxis.label.set_fontsize(LARGE)
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
