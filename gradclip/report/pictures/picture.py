"""Runs in a picture, side by side."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ArgumentError
from ..advice import Advice, advised
from ..run import Run
from ..summary import summarized
from .distribution import counts_of, distribution_limits, draw_distribution, spread
from .heat_map import HeatMap, color_range, draw_heat_map, heat_map_of
from .names import drawable, short_names
from .panels import draw_clip_rate, draw_norms, norm_limits, set_steps
from .style import LARGE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
MOST_RUNS = 12
"""Runs in one picture."""


def check_picture(path: str | os.PathLike[str]) -> None:
    """Find out whether a picture can be drawn there, before there is one.

    Args:
        path: Of the file.

    Raises:
        ArgumentError: It doesn't end with .png or .svg, is a folder, or in a folder that is not
            there.
        ImportError: matplotlib is not installed.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentError(f"The picture's path is a {type(path).__name__}: give a path.")
    name = os.fspath(path)
    needed = "give a file that ends with .png or .svg"
    if os.path.splitext(name)[1].lower() not in ENDINGS or "\0" in name:
        raise ArgumentError(f"The picture's path is {name!r}: {needed}.")
    if os.path.isdir(name):
        raise ArgumentError(f"The picture's path {name!r} is a folder: {needed}.")
    folder = os.path.dirname(name)
    if folder and not os.path.isdir(folder):
        raise ArgumentError(f"There is no folder {folder!r} for the picture: make it, or {needed}.")
    _require_matplotlib()


def check_runs(runs: Sequence[Run]) -> None:
    """Find out whether runs can be in one picture.

    Raises:
        ArgumentError: They are too many.
    """
    if len(runs) > MOST_RUNS:
        raise ArgumentError(
            f"Found {len(runs)} runs: a picture has room for {MOST_RUNS}, give fewer."
        )


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "gradclip[report]".') from error


def draw(
    runs: Sequence[Run], path: str | os.PathLike[str], advice: Sequence[Advice] | None = None
) -> Figure:
    """Write a picture of runs, side by side.

    Args:
        runs: At least one.
        path: Where to: a file that ends with .png or .svg. One that is there is replaced when all
            has been drawn.
        advice: For each run; None finds it.

    Returns:
        The picture, for notebooks.

    Raises:
        ArgumentError: There can be no picture at this path, or there are too many runs.
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written; one that was there is as it was.
    """
    check_picture(path)
    return _drawn(runs, advice, path)


def figure_of(runs: Sequence[Run], advice: Sequence[Advice] | None = None) -> Figure:
    """Return what `draw` writes, a figure that pyplot does not know of.

    Raises:
        ArgumentError: There are too many runs.
        ImportError: matplotlib is not installed.
    """
    _require_matplotlib()
    return _drawn(runs, advice)


def _drawn(
    runs: Sequence[Run],
    advice: Sequence[Advice] | None,
    path: str | os.PathLike[str] | None = None,
) -> Figure:
    import matplotlib

    check_runs(runs)
    with matplotlib.rc_context(), np.errstate(over="ignore", under="ignore"):
        matplotlib.rcdefaults()  # the user's own style may not fit
        matplotlib.rcParams["svg.hashsalt"] = "gradclip"  # the same picture, the same bytes
        figure = _figure(runs, advice or [advised(run, summarized(run)) for run in runs])
        if path is not None:
            _save(figure, os.fspath(path))
    return figure


def _figure(runs: Sequence[Run], advice: Sequence[Advice]) -> Figure:
    from .canvas import Picture

    maps = [heat_map_of(run, run.parameter_norms) if run.parameter_norms else None for run in runs]
    heights = [2.5, 1.0, 1.7]
    shown = [each for each in maps if each is not None]
    if shown:
        heights.append(0.18 * max(8, *(len(each.names) for each in shown)) + 0.7)
    beside = 0.075 * max([len(label) for each in shown for label in each.labels], default=0)
    width = 10.0 if len(runs) == 1 else 5.5 + max(beside, 0.5)  # of a run
    figure = Picture(figsize=(width * len(runs), sum(heights) + 0.6 * len(heights)), dpi=100)
    panels = figure.subplots(len(heights), len(runs), squeeze=False, height_ratios=heights)
    _fill(figure, panels, runs, advice, maps)
    return figure


def _fill(
    figure: Figure,
    panels: Any,
    runs: Sequence[Run],
    advice: Sequence[Advice],
    maps: Sequence[HeatMap | None],
) -> None:
    shown = [each for each in maps if each is not None]
    colors = color_range(shown) if shown else (0.0, 1.0)
    limits, range_ = norm_limits(runs), distribution_limits(runs, advice)
    most = max(int(counts_of(run, range_)[0].max()) for run in runs)
    room = 70 if len(runs) == 1 else 40
    titles = [drawable(each) for each in short_names([run.name for run in runs], room, os.sep)]
    labels = []
    for column, run in enumerate(runs):
        norms, rates, distribution, *below = panels[:, column]
        draw_norms(norms, run, limits)
        _add_legend(norms, titles[column])
        draw_clip_rate(rates, run)
        labels.append(draw_distribution(distribution, run, advice[column], range_, most))
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
    figure.draw_without_rendering()
    for axes, above in zip(panels[2], labels, strict=True):
        spread(axes, above)


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
    legend.get_title().set_parse_math(False)


def _save(figure: Figure, path: str) -> None:
    """Write a figure to a file, whole or not at all."""
    content = io.BytesIO()
    if path.lower().endswith(".svg"):
        figure.savefig(content, format="svg", metadata={"Date": None})
    else:
        figure.savefig(content, format="png", pil_kwargs={"optimize": True})
    target = os.path.realpath(path)  # a link stays one
    beside = f"{target}.{os.getpid()}.part"
    try:
        with open(beside, "wb") as file:
            file.write(content.getvalue())
        os.replace(beside, target)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
