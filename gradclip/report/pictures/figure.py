"""The layout of a picture of runs: a column of panels for each run, with shared axes."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..advice import Advice
from ..run import Run
from .distribution import counts_of, distribution_limits, draw_distribution, spread
from .heat_map import HeatMap, color_range, draw_heat_map, heat_map_of
from .panels import draw_clip_rate, draw_norms, norm_limits, set_steps
from .style import LARGE, TEXT, drawable, short_names


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
    heights = [2.5, 1.0, 1.7]  # inches
    if shown_maps:
        heights.append(0.18 * max(8, *(len(each.names) for each in shown_maps)) + 0.7)
    labels = [label for heat_map in shown_maps for label in heat_map.labels]
    beside = 0.075 * max(map(len, labels), default=0)
    run_width = 10.0 if len(runs) == 1 else 5.5 + max(beside, 0.5)
    size = (run_width * len(runs), sum(heights) + 0.6 * len(heights))
    figure = Picture(figsize=size, dpi=100)
    panels = figure.subplots(len(heights), len(runs), squeeze=False, height_ratios=heights)
    _draw_panels(figure, panels, runs, advice, maps)
    return figure


def _draw_panels(
    figure: Figure,
    panels: Any,
    runs: Sequence[Run],
    advice: Sequence[Advice],
    maps: Sequence[HeatMap | None],
) -> None:
    shown_maps = [heat_map for heat_map in maps if heat_map is not None]
    colors = color_range(shown_maps) if shown_maps else (0.0, 1.0)
    limits, range_ = norm_limits(runs), distribution_limits(runs, advice)
    most = max(int(counts_of(run, range_)[0].max()) for run in runs)
    characters = 70 if len(runs) == 1 else 40
    names = short_names([run.name for run in runs], characters, os.sep)
    threshold_labels = []
    for column, run in enumerate(runs):
        norms, rates, distribution, *below = panels[:, column]
        draw_norms(norms, run, limits)
        _add_legend(norms, drawable(names[column]))
        draw_clip_rate(rates, run)
        threshold_labels.append(draw_distribution(distribution, run, advice[column], range_, most))
        set_steps(norms, run)
        norms.tick_params(labelbottom=False)
        set_steps(rates, run)
        heat_map = maps[column]
        if heat_map is not None:
            draw_heat_map(below[0], heat_map, *colors)
            set_steps(below[0], run)
            below[0].tick_params(axis="x", labelsize=TEXT)
        elif below:
            below[0].set_visible(False)
    for axes, name in zip(panels[:3, 0], ("gradient norm", "clipped", "steps"), strict=True):
        axes.set_ylabel(name, fontsize=LARGE)
    figure.align_ylabels(panels[:3, 0])
    figure.draw_without_rendering()  # labels can be spread when their widths are known
    for axes, labels in zip(panels[2], threshold_labels, strict=True):
        spread(axes, labels)


def _add_legend(axes: Axes, title: str) -> None:
    """Put the legend and the title above a panel, where no curve runs."""
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
