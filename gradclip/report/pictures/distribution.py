"""The panel of a picture that shows how norms are distributed, and what thresholds clip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..advice import Advice
from ..printing import number
from ..run import Run
from .curves import positive
from .panels import extremes, finish
from .style import BLUE, LARGE, SMALL, VERMILION, log_limits, set_log_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

BINS = 80
"""Of the distribution."""
BETWEEN = 6
"""Points between the labels of thresholds."""


def distribution_limits(runs: Sequence[Run], advice: Sequence[Advice]) -> tuple[float, float]:
    """Return the limits of the axis of a distribution, the same for all runs."""
    limits = [[*each.shares, *([each.threshold] if each.threshold else [])] for each in advice]
    values = [extremes(positive(run.norms)) for run in runs]
    return log_limits(np.concatenate([*values, *map(positive, limits)]), 0.03, 0.03)


def counts_of(
    run: Run, limits: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return how many norms lie between edges, and the edges, evenly spaced by logarithm."""
    norms = positive(run.norms)
    edges = np.linspace(np.log10(limits[0]), np.log10(limits[1]), BINS + 1)
    counts, _ = np.histogram(np.log10(norms[~np.isnan(norms)]), edges)
    return counts, 10**edges


def draw_distribution(
    axes: Axes, run: Run, advice: Advice, limits: tuple[float, float], most: int
) -> list[Annotation]:
    """Draw how many steps had which norm, and what thresholds would have clipped.

    Args:
        axes: Where.
        run: The run.
        advice: Thresholds to show.
        limits: Of the horizontal axis.
        most: The largest count of all runs.

    Returns:
        The labels of the thresholds above the panel, for `spread`.
    """
    set_log_axis(axes, "x", *limits)
    set_log_axis(axes, "y", 0.5, max(most, 2) * 2, least=1)
    counts, edges = counts_of(run, limits)
    axes.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=BLUE)
    labels = [
        _label(axes, limit, share, advised=limit == advice.threshold)
        for limit, share in _shown(run, advice)
    ]
    if labels:
        axes.annotate(
            "threshold\nclips",
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(-8, 14),
            textcoords="offset points",
            ha="right",
            va="bottom",
            multialignment="right",
            fontsize=SMALL,
            color="0.25",
            linespacing=1.1,
        )
    if not counts.any():
        axes.text(
            0.5,
            0.5,
            "no norm is finite and above 0",
            transform=axes.transAxes,
            ha="center",
            fontsize=LARGE,
        )
    axes.set_xlabel("norm before clipping")
    finish(axes)
    return labels


def _shown(run: Run, advice: Advice) -> list[tuple[float, float]]:
    """Return thresholds with the share that each would have clipped; one is that to take."""
    shares = dict(advice.shares)
    if advice.threshold is not None and advice.threshold not in shares:
        shares[advice.threshold] = float((run.norms[run.finite] > advice.threshold).mean())
    return sorted(shares.items())


def _label(axes: Axes, limit: float, share: float, *, advised: bool) -> Annotation:
    """Draw a threshold, and above the panel its label; all at one place until they are spread."""
    place = float(positive(limit))
    color = VERMILION if advised else "0.25"
    axes.axvline(place, color=color, linestyle="-" if advised else ":", linewidth=1.2)
    return axes.annotate(
        "advised\n" * advised + f"{number(limit)}\n{percent(share)}",
        xy=(place, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0.5, 14),
        textcoords=("axes fraction", "offset points"),
        ha="center",
        va="bottom",
        multialignment="center",
        fontsize=SMALL,
        fontweight="bold" if advised else "normal",
        color=color,
        linespacing=1.1,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (0.5, 0),
            "patchA": None,
        },
    )


def spread(axes: Axes, labels: Sequence[Annotation]) -> None:
    """Move labels over their thresholds, apart where they would overlap, within the panel.

    Where there is no room side by side, they are turned.

    Args:
        axes: The panel, laid out.
        labels: From left to right.
    """
    if not labels:
        return
    panel = axes.bbox
    places = [(label.xy[0], 1.0) for label in labels]
    dpi = axes.figure.dpi
    widths = _widths(labels, dpi)
    if widths.sum() > panel.width:
        for label in labels:
            label.set_rotation(90)
            label.set_text(label.get_text().replace("\n", ", "))
        widths = _widths(labels, dpi)
    own = panel.width * axes.transLimits.transform(axes.transScale.transform(places))[:, 0]
    centers = separated(own, widths, panel.width)
    for label, center in zip(labels, centers, strict=True):
        label.set_x(center / panel.width)


def _widths(labels: Sequence[Annotation], dpi: float) -> NDArray[np.float64]:
    """Return how wide the texts of labels are, with room between them, in pixels."""
    from matplotlib.text import Text

    boxes = [Text.get_window_extent(label) for label in labels]  # without the line below
    return np.array([box.width for box in boxes]) + BETWEEN * dpi / 72


def separated(
    wanted: NDArray[np.float64], widths: NDArray[np.float64], room: float
) -> NDArray[np.float64]:
    """Return centers as near as can be to those wanted, at which nothing overlaps.

    Args:
        wanted: Rising.
        widths: Of what is to be there.
        room: It lies between 0 and this, as far as it fits.
    """
    # Where each would be if all stood side by side; less that, the order alone counts.
    side_by_side = np.cumsum(widths) - widths / 2
    blocks: list[list[float]] = []  # of those that touch: their mean and number
    for each in wanted - side_by_side:
        blocks.append([float(each), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, count), (before, more) = blocks.pop(), blocks.pop()
            total = count + more
            blocks.append([(mean * count + before * more) / total, total])
    moved = np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks])
    held: NDArray[np.float64] = np.clip(moved, 0, max(room - widths.sum(), 0))
    return held + side_by_side


def percent(share: float) -> str:
    """Return a share in percent, with two digits, or three near the whole."""
    return f"{100 * share:.{2 if share < 0.99 else 3}g}%"
