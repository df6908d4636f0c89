"""Norms of single parameters over the steps, as a map of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..run import LoggedParameterNorms, Run
from .names import drawable, short_names
from .style import NOT_LOGGED, SMALL, TEXT, VERMILION, log_tick_label, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS = 24
"""Parameters that are shown, so that their names are readable."""
MOST_COLUMNS = 400
"""Parts of the steps that are shown."""
MOST_CHARACTERS = 34
"""Of a name beside the map."""


@dataclass(frozen=True)
class HeatMap:
    """The largest norm of some parameters in each part of the steps."""

    names: tuple[str, ...]
    """Of the parameters shown, from the top."""
    known: int
    """How many parameters were logged."""
    edges: NDArray[np.float64]
    """Where the parts begin, and where the last one ends."""
    norms: NDArray[np.float64]
    """Of each parameter in each part; NaN where none was logged that is finite."""
    nonfinite: NDArray[np.bool_]
    """Where a norm was not finite."""

    @property
    def labels(self) -> list[str]:
        """The names as they fit beside the map."""
        return [drawable(name) for name in short_names(self.names, MOST_CHARACTERS, ".")]


def heat_map_of(run: Run, logged: LoggedParameterNorms) -> HeatMap:
    """Return the map of a run: those parameters that had the largest share of its norm."""
    steps, moments = np.unique(logged.steps, return_inverse=True)
    chosen = np.argsort(-_shares(run, logged, moments, len(steps)), kind="stable")[:MOST_ROWS]
    chosen.sort()  # in the order of the log, which is that of the model
    row_of = np.full(len(logged.names), -1)
    row_of[chosen] = np.arange(len(chosen))
    columns = min(len(steps), MOST_COLUMNS)
    column_of = np.arange(len(steps)) * columns // len(steps)
    shown = row_of[logged.places] >= 0
    cells = row_of[logged.places[shown]], column_of[moments[shown]]
    norms = logged.norms[shown]
    finite = np.isfinite(norms)
    largest = np.full((len(chosen), columns), -np.inf)
    np.maximum.at(largest, cells, np.where(finite, norms, -np.inf))
    nonfinite = np.zeros(largest.shape, dtype=bool)
    nonfinite[cells[0][~finite], cells[1][~finite]] = True
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    begins = steps[np.flatnonzero(np.diff(column_of, prepend=-1))]
    return HeatMap(
        tuple(logged.names[place] for place in chosen),
        len(logged.names),
        np.append(begins, steps[-1] + gap) - 0.5,
        np.where(largest >= 0, largest, np.nan),
        nonfinite,
    )


def _shares(
    run: Run, logged: LoggedParameterNorms, moments: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return the mean share of each parameter in the norm, and more for those to blame.

    Those are to blame whose norm was not finite while that of others was: the fewer they were, the
    more.
    """
    totals = run.norms[np.searchsorted(run.steps, logged.steps)]
    faults = ~np.isfinite(logged.norms)
    faults_of_step = np.bincount(moments, weights=faults, minlength=count)[moments]
    fits = ~faults & np.isfinite(totals) & (totals > 0)
    shares = np.zeros(len(faults))
    # More than the whole is possible for small numbers that were rounded alone.
    shares[fits] = np.minimum(logged.norms[fits], totals[fits]) / totals[fits]
    means = np.bincount(logged.places, weights=shares, minlength=len(logged.names)) / count
    blame = np.zeros(len(logged.names))
    np.maximum.at(blame, logged.places[faults], 1 / faults_of_step[faults])
    return means + blame


def color_range(maps: Sequence[HeatMap]) -> tuple[float, float]:
    """Return the logarithms where the colours of several maps begin and end.

    They end at the largest norm, so that none is hidden. Of the lowest, a hundredth is left out:
    a single norm next to 0 would take all colours from the others.
    """
    norms = np.concatenate([each.norms.ravel() for each in maps])
    logarithms = np.log10(norms[norms > 0])
    if not len(logarithms):
        return -1.0, 1.0
    low, high = float(np.percentile(logarithms, 1)), float(logarithms.max())
    return (low, high) if high - low >= 0.2 else (high - 0.2, high + 0.2)


def draw_heat_map(axes: Axes, shown: HeatMap, low: float, high: float) -> None:
    """Draw a map.

    Args:
        axes: Where; the panel's horizontal axis is set by the caller.
        shown: The map.
        low: Logarithm of the norm with which the colours begin.
        high: And end.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter

    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101  # it has been made by one
    with np.errstate(divide="ignore"):
        logarithms = np.log10(shown.norms)  # of 0: below all colours
    logarithms = np.maximum(logarithms, low - 1)
    rows = np.arange(len(shown.names) + 1)
    mesh = axes.pcolormesh(
        shown.edges,
        rows,
        np.ma.masked_invalid(logarithms),
        cmap=colormaps["viridis"].with_extremes(bad=NOT_LOGGED),
        vmin=low,
        vmax=high,
        rasterized=True,
    )
    handles = []
    if shown.nonfinite.any():
        faults = np.ma.masked_equal(shown.nonfinite.astype(float), 0.0)
        colors = ListedColormap([VERMILION])
        axes.pcolormesh(shown.edges, rows, faults, cmap=colors, rasterized=True)
        handles.append(Patch(color=VERMILION, label="not finite"))
    if (np.isnan(shown.norms) & ~shown.nonfinite).any():
        handles.append(Patch(color=NOT_LOGGED, label="not logged"))
    axes.set_ylim(len(shown.names), 0)
    axes.set_yticks(rows[:-1] + 0.5, labels=shown.labels, fontsize=SMALL)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.tick_params(axis="y", length=0)
    # Above the map, with its explanation: no cell is hidden.
    axes.legend(
        handles=handles,
        title=_title(shown),
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
    bar = figure.colorbar(
        mesh,
        ax=axes,
        location="bottom",
        shrink=0.8,
        aspect=40,
        extend=_extend(shown, low),
        ticks=np.log10(log_ticks(10**low, 10**high)),
        format=FuncFormatter(lambda power, _: log_tick_label(10.0**power, plain=plain)),
    )
    bar.ax.tick_params(labelsize=TEXT)
    bar.set_label("norm of a parameter, largest in each cell", fontsize=TEXT)


def _title(shown: HeatMap) -> str:
    count = len(shown.names)
    if count == shown.known:
        return f"norms before clipping of {'all ' * (count > 1)}{count} logged parameters"
    return f"norms of {count} of {shown.known:,} logged parameters:\nthose with the largest share"


def _extend(shown: HeatMap, low: float) -> str:
    with np.errstate(divide="ignore"):
        return "min" if (np.log10(shown.norms) < low).any() else "neither"
