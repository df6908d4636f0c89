"""The panel with the distribution of norms and the share that each threshold would clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from numpy.typing import NDArray

from ..advice import Advice
from ..printing import number
from ..run import Run
from .panels import finish
from .style import BLUE, LARGE, SMALL, VERMILION, extremes, log_limits, positive, set_log_axis

BINS = 80
"""Bins of the distribution."""
GAP = 6
"""Points between the labels of two thresholds."""


def distribution_limits(runs: Sequence[Run], advice: Sequence[Advice]) -> tuple[float, float]:
    """Return the limits of the norms' axis, the same for all runs."""
    values = [extremes(positive(run.norms)) for run in runs]
    for run_advice in advice:
        values.append(positive([*run_advice.shares]))
        values.append(positive([run_advice.threshold or np.nan]))
    return log_limits(np.concatenate(values), 0.03, 0.03)


def counts_of(
    run: Run, limits: tuple[float, float]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the number of norms in each bin, and the edges of the bins, evenly spaced by log."""
    norms = positive(run.norms)
    edges = np.linspace(np.log10(limits[0]), np.log10(limits[1]), BINS + 1)
    counts, _ = np.histogram(np.log10(norms[~np.isnan(norms)]), edges)
    return counts, 10**edges


def draw_distribution(
    axes: Axes, run: Run, advice: Advice, limits: tuple[float, float], most: int
) -> list[Annotation]:
    """Draw the number of steps by norm, and the thresholds with the share that each clips.

    Args:
        axes: The panel.
        run: The run.
        advice: Advice with the thresholds to show.
        limits: Limits of the norms' axis.
        most: Largest count in a bin, of all runs.

    Returns:
        The labels of the thresholds above the panel, for `spread`.
    """
    set_log_axis(axes, "x", *limits)
    set_log_axis(axes, "y", 0.5, max(most, 2) * 2, least=1)
    counts, edges = counts_of(run, limits)
    # Empty bins end at the axis: a logarithmic axis has no 0.
    axes.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=BLUE)
    labels = [
        _draw_threshold(axes, threshold, share, _word_for(threshold, advice))
        for threshold, share in _thresholds(run, advice)
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


def _thresholds(run: Run, advice: Advice) -> list[tuple[float, float]]:
    """Return the thresholds to show, the one that fits among them, with the share each clips."""
    shares = dict(advice.shares)
    if advice.threshold is not None and advice.threshold not in shares:
        shares[advice.threshold] = float((run.norms[run.finite] > advice.threshold).mean())
    return sorted(shares.items())


def _word_for(threshold: float, advice: Advice) -> str:
    """Return what a threshold is in the advice: an empty text for most."""
    if threshold != advice.threshold:
        return ""
    return "advised" if threshold == advice.max_norm else "if fixed"


def _draw_threshold(axes: Axes, threshold: float, share: float, word: str) -> Annotation:
    """Draw the line of a threshold and its label above the panel, in the middle until `spread`."""
    position = float(positive(threshold))
    color = VERMILION if word else "0.25"
    axes.axvline(position, color=color, linestyle="-" if word else ":", linewidth=1.2)
    return axes.annotate(
        "\n".join(filter(None, (word, number(threshold), percent(share)))),
        xy=(position, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0.5, 14),
        textcoords=("axes fraction", "offset points"),
        ha="center",
        va="bottom",
        multialignment="center",
        fontsize=SMALL,
        fontweight="bold" if word else "normal",
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
    """Move labels above their thresholds, apart where they would overlap, within the panel.

    Labels that do not fit side by side are turned by 90 degrees.

    Args:
        axes: The panel, laid out.
        labels: Labels from left to right.
    """
    if not labels:
        return
    panel = axes.bbox
    dpi = axes.figure.dpi
    widths = _widths(labels, dpi)
    if widths.sum() > panel.width:
        for label in labels:
            label.set_rotation(90)
            label.set_text(label.get_text().replace("\n", ", "))
        widths = _widths(labels, dpi)
    to_fractions = axes.transScale + axes.transLimits
    fractions = to_fractions.transform([(label.xy[0], 1.0) for label in labels])[:, 0]
    centers = separated(panel.width * fractions, widths, panel.width)
    for label, center in zip(labels, centers, strict=True):
        label.set_x(center / panel.width)


def _widths(labels: Sequence[Annotation], dpi: float) -> NDArray[np.float64]:
    """Return the widths of the labels' texts in pixels, each with a gap."""
    # The extent of an annotation would include the line down to its threshold.
    boxes = [Text.get_window_extent(label) for label in labels]
    return np.array([box.width for box in boxes]) + GAP * dpi / 72


def separated(
    wanted: NDArray[np.float64], widths: NDArray[np.float64], room: float
) -> NDArray[np.float64]:
    """Return the centers nearest to the wanted ones at which nothing overlaps.

    Args:
        wanted: Wanted centers, rising.
        widths: Widths of the items.
        room: Items are kept between 0 and this, if they fit.
    """
    # Relative to the centers of items that stand side by side, "no overlap" means "not falling".
    # The nearest sequence that does not fall is found by pooling adjacent violators: neighbours in
    # the wrong order form a block at their mean.
    side_by_side = np.cumsum(widths) - widths / 2
    blocks: list[list[float]] = []  # mean and number of items
    for offset in wanted - side_by_side:
        blocks.append([float(offset), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (mean, count), (mean_before, count_before) = blocks.pop(), blocks.pop()
            total = count + count_before
            blocks.append([(mean * count + mean_before * count_before) / total, total])
    offsets = np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks])
    inside: NDArray[np.float64] = np.clip(offsets, 0, max(room - widths.sum(), 0))
    return inside + side_by_side


def percent(share: float) -> str:
    """Return a share in percent with two digits, with three from 99 % on."""
    return f"{100 * share:.{2 if share < 0.99 else 3}g}%"
