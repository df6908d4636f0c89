"""The picture of the demo: losses and norms of both runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...report.printing import number
from .options import Options

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .training import Curves

# From Okabe and Ito's palette, whose colours differ for the colour-blind as well.
VERMILION, BLUE = "#D55E00", "#0072B2"

LARGE_LOSS = 100.0
"""Losses above this need a logarithmic axis."""


def draw(runs: Sequence[Curves], options: Options) -> None:
    """Write the picture. Its figure has its own canvas and is not managed by pyplot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The margin of an axis overflows for a max_norm near the end of float64, harmlessly.
    with matplotlib.rc_context(), np.errstate(over="ignore"):
        matplotlib.rcdefaults()  # a style of the user may not fit
        figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        losses, norms = figure.subplots(2, 1, sharex=True)
        figure.suptitle(_title(runs), x=0.01, ha="left", fontsize=15, fontweight="bold")
        _draw_losses(losses, runs)
        _draw_norms(norms, runs, options.max_norm)
        _add_legend(losses, norms)
        norms.set_xlabel(f"step ({options.cell} learning characters)", fontsize=12)
        figure.savefig(options.picture, format="png")


def _title(runs: Sequence[Curves]) -> str:
    ends = " and ".join(f"at {number(curves.final_loss)} {curves.title}" for curves in runs)
    return f"The loss ends {ends}"


def _add_legend(losses: Axes, norms: Axes) -> None:
    """Put one legend for both panels above the upper one, where no curve runs."""
    (threshold, *handles), (name, *names) = norms.get_legend_handles_labels()
    losses.legend(
        [*handles, threshold],
        [*names, name],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=3,
        frameon=False,
        fontsize=12,
    )


def _draw_losses(axes: Axes, runs: Sequence[Curves]) -> None:
    finite = [loss for curves in runs for loss in curves.losses if math.isfinite(loss)]
    logarithmic = max(finite, default=0.0) > LARGE_LOSS
    axes.set_yscale("log" if logarithmic else "linear")
    for curves in runs:
        _draw_curve(axes, curves, curves.losses)
    if not logarithmic:
        axes.set_ylim(bottom=0)
    _finish(axes, "loss")


def _draw_norms(axes: Axes, runs: Sequence[Curves], max_norm: float) -> None:
    axes.set_yscale("log")
    # Drawn first: norms that are all 0 or NaN would leave a logarithmic axis without a range.
    label = f"max_norm = {max_norm:g}"
    # A logarithmic axis has no 0, and old versions of matplotlib fail near the end of float64.
    height = min(max_norm, 1e300) or math.nan
    axes.axhline(height, color="black", linestyle="--", linewidth=1.5, zorder=3, label=label)
    for curves in runs:
        _draw_curve(axes, curves, curves.norms)
    _finish(axes, "gradient norm\nbefore clipping")


def _draw_curve(axes: Axes, curves: Curves, values: Sequence[float]) -> None:
    color = BLUE if curves.clips else VERMILION
    marker = "." if len(values) == 1 else None  # a single point makes no line
    axes.plot(values, color=color, linewidth=1.3, marker=marker, label=curves.title)
    _mark_nonfinite(axes, values, color, line=int(curves.clips))


def _mark_nonfinite(axes: Axes, values: Sequence[float], color: str, line: int) -> None:
    """Mark the first value that is not finite, with a text in the given line."""
    first = next((step for step, value in enumerate(values) if not math.isfinite(value)), None)
    if first is None:
        return
    axes.axvline(first, color=color, linestyle=":")
    late = first > len(values) / 2
    axes.annotate(
        f"first {number(values[first])} at step {first}",
        xy=(first, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(-5 if late else 5, -3 - 16 * line),
        textcoords="offset points",
        ha="right" if late else "left",
        va="top",
        color=color,
        fontsize=12,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _finish(axes: Axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(name, fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=11)
    axes.grid(visible=True, color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
