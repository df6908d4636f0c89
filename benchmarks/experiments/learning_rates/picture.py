"""The picture of final losses by learning rate, with a panel for each network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.learning_rates.curves import BEST, NEAR, ONE, Curve, lowest
from benchmarks.experiments.without_tuning.arms import AUTO, NONE
from gradclip.report.pictures.figure import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Look:
    """How a curve is drawn."""

    label: str
    color: str
    marker: str
    line: str
    width: float
    size: float


# Okabe and Ito's palette, whose colours differ for the colour-blind as well. Curves lie on one
# another where clipping changes nothing: those drawn first are wider.
LOOKS = {
    BEST: Look("best fixed threshold", "#E69F00", "s", "-", 5.0, 11),
    ONE: Look("threshold 1", "#56B4E9", "D", "--", 2.8, 8),
    NONE: Look("no clipping", "#000000", "X", ":", 2.2, 8),
    AUTO: Look('max_norm="auto"', "#D55E00", "o", "-", 1.6, 5),
}
LANE = 0.13
"""Height in nats of the lane of each curve in the strip for diverged means, above a guess."""
MARGIN = 0.1
"""Space in nats below the lowest loss."""


def draw(curves: Mapping[str, Mapping[str, Curve]], path: Path, guess: float) -> None:
    """Draw the curves of all networks.

    Args:
        curves: The curves by network and name.
        path: File of the picture.
        guess: Loss of a model for which all characters are equally likely; means above it, and
            those that are not finite, are drawn in a strip on top, each curve in its own lane.
    """
    losses = [
        loss for each in curves.values() for name in LOOKS for p in each[name] for loss in p.losses
    ]
    lowest_loss = min(filter(math.isfinite, losses))
    figure = Picture(figsize=(6.2 * len(curves), 5.4), dpi=100)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axes, (network, of_network) in zip(panels, curves.items(), strict=True):
        _draw_network(axes, of_network, guess)
        axes.set_title(network, loc="left", fontsize=13, fontweight="bold")
        axes.set_xlabel("learning rate", fontsize=12)
    panels[0].set_ylim(lowest_loss - MARGIN, guess + LANE * len(LOOKS))
    panels[0].set_ylabel("final held-out loss, nats", fontsize=12)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=11)
    figure.savefig(path, format="png")


def _draw_network(axes: Axes, curves: Mapping[str, Curve], guess: float) -> None:
    top = guess + LANE * len(LOOKS)
    axes.set_xscale("log")
    rates = [point.rate for point in curves[NONE]]
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.axhspan(guess, top, color="0.92", linewidth=0)
    axes.text(
        0.01,
        (guess + top) / 2,
        "diverged",
        transform=axes.get_yaxis_transform(),
        va="center",
        color="0.3",
    )
    for lane, (name, look) in enumerate(LOOKS.items()):
        diverged = guess + LANE * (lane + 0.5)
        axes.plot(
            rates,
            [point.mean if point.mean <= guess else diverged for point in curves[name]],
            label=look.label,
            color=look.color,
            marker=look.marker,
            linestyle=look.line,
            linewidth=look.width,
            markersize=look.size,
        )
        whole = [point for point in curves[name] if point.mean <= guess]
        axes.vlines(
            [point.rate for point in whole],
            [min(point.losses) for point in whole],
            [min(guess, max(point.losses)) for point in whole],
            color=look.color,
            linewidth=1,
        )
    near = (1 + NEAR) * lowest(curves.values()).mean
    axes.axhline(near, color="0.5", linewidth=1, linestyle="-.", label=f"{NEAR:.0%} above the best")
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
