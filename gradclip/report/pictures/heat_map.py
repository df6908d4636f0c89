"""The panel with a heat map of the gradient norm of each parameter over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from ..run import LoggedParameterNorms, Run
from ..shares import mean_shares
from .style import (
    NOT_LOGGED,
    SMALL,
    TEXT,
    VERMILION,
    drawable,
    log_tick_label,
    log_ticks,
    short_names,
)

MOST_ROWS = 24
"""Number of parameters shown: the names of more would not be readable."""
MOST_COLUMNS = 400
"""Number of intervals that the steps are divided into."""
MOST_CHARACTERS = 34
"""Length of a name beside the map."""


@dataclass(frozen=True)
class HeatMap:
    """The largest norm of some parameters in each interval of the steps."""

    names: tuple[str, ...]
    """Names of the shown parameters, from the top."""
    logged: int
    """Number of logged parameters."""
    edges: NDArray[np.float64]
    """Steps at which the intervals begin, and the end of the last interval."""
    norms: NDArray[np.float64]
    """Largest finite norm, of shape (parameters, intervals); NaN without a finite norm."""
    nonfinite: NDArray[np.bool_]
    """True in cells with a norm that is not finite, of the same shape."""

    @property
    def labels(self) -> list[str]:
        """Names short enough to stand beside the map."""
        return [drawable(name) for name in short_names(self.names, MOST_CHARACTERS, ".")]


def heat_map_of(run: Run, logged: LoggedParameterNorms) -> HeatMap:
    """Return the map of a run, of the parameters with the largest share of its norm."""
    steps, step_indices = np.unique(logged.steps, return_inverse=True)
    shares = mean_shares(run, logged)
    chosen = np.argsort(-shares, kind="stable")[:MOST_ROWS]
    chosen.sort()  # back to the order of the log, which is that of the model
    row_of_name = np.full(len(logged.names), -1)
    row_of_name[chosen] = np.arange(len(chosen))
    columns = min(len(steps), MOST_COLUMNS)
    column_of_step = np.arange(len(steps)) * columns // len(steps)
    shown = row_of_name[logged.name_indices] >= 0
    cells = row_of_name[logged.name_indices[shown]], column_of_step[step_indices[shown]]
    norms = logged.norms[shown]
    finite = np.isfinite(norms)
    largest = np.full((len(chosen), columns), -np.inf)
    np.maximum.at(largest, cells, np.where(finite, norms, -np.inf))
    nonfinite = np.zeros(largest.shape, dtype=bool)
    nonfinite[cells[0][~finite], cells[1][~finite]] = True
    # The last interval ends where the next logged step would be.
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    begins = steps[np.flatnonzero(np.diff(column_of_step, prepend=-1))]
    return HeatMap(
        tuple(logged.names[index] for index in chosen),
        len(logged.names),
        np.append(begins, steps[-1] + gap) - 0.5,
        np.where(largest >= 0, largest, np.nan),
        nonfinite,
    )


def color_range(maps: Sequence[HeatMap]) -> tuple[float, float]:
    """Return the logarithms of the norms at which the colours of several maps begin and end.

    The colours end at the largest norm, so that no large norm is hidden. They begin at the first
    percentile: a single norm near 0 would take nearly all colours.
    """
    norms = np.concatenate([heat_map.norms.ravel() for heat_map in maps])
    logarithms = np.log10(norms[norms > 0])
    if not len(logarithms):
        return -1.0, 1.0
    low, high = float(np.percentile(logarithms, 1)), float(logarithms.max())
    return (low, high) if high - low >= 0.2 else (high - 0.2, high + 0.2)


def draw_heat_map(axes: Axes, heat_map: HeatMap, low: float, high: float) -> None:
    """Draw a map.

    Args:
        axes: The panel; the caller sets its horizontal axis.
        heat_map: The map.
        low: Logarithm of the norm at which the colours begin.
        high: Logarithm of the norm at which they end.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101  # for mypy: the panel is part of a figure
    with np.errstate(divide="ignore"):
        logarithms = np.log10(heat_map.norms)
    logarithms = np.maximum(logarithms, low - 1)  # a norm of 0 gets the lowest colour
    rows = np.arange(len(heat_map.names) + 1)
    mesh = axes.pcolormesh(
        heat_map.edges,
        rows,
        np.ma.masked_invalid(logarithms),
        cmap=colormaps["viridis"].with_extremes(bad=NOT_LOGGED),
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    handles = []
    if heat_map.nonfinite.any():
        marks = np.ma.masked_equal(heat_map.nonfinite.astype(float), 0.0)
        colors = ListedColormap([VERMILION])
        axes.pcolormesh(heat_map.edges, rows, marks, cmap=colors, rasterized=True)
        handles.append(Patch(color=VERMILION, label="not finite"))
    if (np.isnan(heat_map.norms) & ~heat_map.nonfinite).any():
        handles.append(Patch(color=NOT_LOGGED, label="not logged"))
    axes.set_ylim(len(heat_map.names), 0)
    axes.set_yticks(rows[:-1] + 0.5, labels=heat_map.labels, fontsize=SMALL)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    # Above the map, where the legend hides no cell.
    axes.legend(
        handles=handles,
        title=_title(heat_map),
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=2,
        frameon=False,
        fontsize=TEXT,
        title_fontsize=TEXT,
    )
    plain = high - low < 2
    color_bar = figure.colorbar(
        mesh,
        ax=axes,
        location="bottom",
        shrink=0.8,
        aspect=40,
        extend=_extend(heat_map, low),
        ticks=np.log10(log_ticks(10**low, 10**high)),
        format=FuncFormatter(lambda power, _: log_tick_label(10.0**power, plain=plain)),
    )
    color_bar.ax.tick_params(labelsize=TEXT)
    color_bar.set_label("norm of a parameter, largest in each cell", fontsize=TEXT)


def _title(heat_map: HeatMap) -> str:
    count = len(heat_map.names)
    if count == heat_map.logged:
        return f"norms before clipping of {'all ' * (count > 1)}{count} logged parameters"
    return (
        f"norms before clipping of {count} of {heat_map.logged:,} logged parameters:\n"
        "those with the largest share of the total norm"
    )


def _extend(heat_map: HeatMap, low: float) -> str:
    """Return "min" if a norm lies below the colour bar, which then gets an arrow there."""
    with np.errstate(divide="ignore"):
        return "min" if (np.log10(heat_map.norms) < low).any() else "neither"
