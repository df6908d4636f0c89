"""The layout of a picture of runs: a column of panels for each run, with shared axes."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..advice import Advice
from ..run import Run
from .distribution import counts_of, distribution_limits, draw_distribution, spread
from .heat_map import HeatMap, color_range, draw_heat_map, heat_map_of
from .panels import (
    draw_clip_rate,
    draw_losses,
    draw_norms,
    loss_limits,
    norm_limits,
    set_steps,
)
from .style import LARGE, TEXT, drawable, short_names

NORMS, LOSSES, RATES, DISTRIBUTION = "gradient norm", "loss", "clipped", "steps"
"""The panels from above, by the names beside them."""
MAP = "map"


class Picture(Figure):
    """A figure with its own canvas, which notebooks show and pyplot does not manage.

    A figure made by pyplot would stay open in a training until somebody closes it.

    Args:
        options: Options of `matplotlib.figure.Figure`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        """Return the PNG that a notebook shows if it has not loaded pyplot."""
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def laid_out(runs: Sequence[Run], advice: Sequence[Advice]) -> Picture:
    """Return the picture of some runs, laid out and drawn, under the current rcParams."""
    maps = [heat_map_of(run, run.parameter_norms) if run.parameter_norms else None for run in runs]
    shown_maps = [heat_map for heat_map in maps if heat_map is not None]
    heights = {NORMS: 2.5, LOSSES: 1.7, RATES: 1.0, DISTRIBUTION: 1.7}  # inches
    if all(run.losses is None for run in runs):
        del heights[LOSSES]
    if shown_maps:
        heights[MAP] = 0.18 * max(8, *(len(each.names) for each in shown_maps)) + 0.7
    labels = [label for heat_map in shown_maps for label in heat_map.labels]
    beside = 0.075 * max(map(len, labels), default=0)
    run_width = 10.0 if len(runs) == 1 else 5.5 + max(beside, 0.5)
    size = (run_width * len(runs), sum(heights.values()) + 0.6 * len(heights))
    figure = Picture(figsize=size, dpi=100)
    ratios = [*heights.values()]
    panels = figure.subplots(len(ratios), len(runs), squeeze=False, height_ratios=ratios)
    _draw_panels(figure, dict(zip(heights, panels, strict=True)), runs, advice, maps)
    return figure


def _draw_panels(
    figure: Figure,
    panels: Mapping[str, Any],
    runs: Sequence[Run],
    advice: Sequence[Advice],
    maps: Sequence[HeatMap | None],
) -> None:
    shown_maps = [heat_map for heat_map in maps if heat_map is not None]
    colors = color_range(shown_maps) if shown_maps else (0.0, 1.0)
    limits, range_ = norm_limits(runs), distribution_limits(runs, advice)
    limits_of_losses = loss_limits(runs)
    most = max(int(counts_of(run, range_)[0].max()) for run in runs)
    characters = 70 if len(runs) == 1 else 40
    names = short_names([run.name for run in runs], characters, os.sep)
    threshold_labels = []
    for column, run in enumerate(runs):
        of_run = {kind: row[column] for kind, row in panels.items()}
        norms, rates, distribution = (of_run[kind] for kind in (NORMS, RATES, DISTRIBUTION))
        draw_norms(norms, run, limits)
        _add_legend(norms, drawable(names[column]))
        if run.losses is not None:
            draw_losses(of_run[LOSSES], run, limits_of_losses)
            set_steps(of_run[LOSSES], run)
            of_run[LOSSES].tick_params(labelbottom=False)
            _add_legend(of_run[LOSSES])
        elif LOSSES in of_run:
            of_run[LOSSES].set_visible(False)
        draw_clip_rate(rates, run)
        threshold_labels.append(draw_distribution(distribution, run, advice[column], range_, most))
        set_steps(norms, run)
        norms.tick_params(labelbottom=False)
        set_steps(rates, run)
        heat_map = maps[column]
        if heat_map is not None:
            draw_heat_map(of_run[MAP], heat_map, *colors)
            set_steps(of_run[MAP], run)
            of_run[MAP].tick_params(axis="x", labelsize=TEXT)
        elif MAP in of_run:
            of_run[MAP].set_visible(False)
    first = {kind: row[0] for kind, row in panels.items() if kind != MAP}
    for kind, axes in first.items():
        axes.set_ylabel(kind, fontsize=LARGE)
    figure.align_ylabels([*first.values()])
    figure.draw_without_rendering()  # labels can be spread when their widths are known
    for axes, labels in zip(panels[DISTRIBUTION], threshold_labels, strict=True):
        spread(axes, labels)


def _add_legend(axes: Axes, title: str | None = None) -> None:
    """Put the legend, and a title, above a panel, where no curve runs."""
    legend = axes.legend(
        title=title,
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=3,
        frameon=False,
        fontsize=TEXT,
        handlelength=1.6,
        columnspacing=1.4,
        title_fontproperties={"size": LARGE + 1, "weight": "bold"},
    )
    legend.get_title().set_parse_math(False)  # a $ in a path is no formula
