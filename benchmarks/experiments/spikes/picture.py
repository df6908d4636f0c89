"""The picture of trainings with corrupted gradients: losses and changes by corruption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.experiments.spikes.outcomes import CLEAN, CONFIDENCE, Interval, Row, names_of
from gradclip.report.pictures.figure import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, whose colours differ for the colour-blind as well; so do the shapes.
COLORS = ("#000000", "#D55E00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#E69F00")
SHAPES = "oXs^vDP"
WIDTH = 0.8
"""Width of the arms of one corruption, as a share of the distance to the next one."""
WIDE = 10.0
"""Ratio of the largest to the smallest loss from which the axis is logarithmic."""
LINEAR = 0.01
"""Changes up to this are drawn to scale, larger ones by their logarithm."""


def draw(rows: Sequence[Row], path: Path, guess: float) -> None:
    """Draw the losses above and their changes below, with a column for each model.

    Args:
        rows: The results.
        path: File of the picture.
        guess: Loss of a model for which all characters are equally likely.
    """
    models = names_of(rows, "model")
    figure = Picture(figsize=(1 + 6.2 * len(models), 8.4), dpi=100)
    panels = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        of_model = [row for row in rows if row.model == model]
        above, below = panels[:, column]
        _draw_losses(above, of_model, guess)
        _draw_changes(below, [row for row in of_model if row.corruption != CLEAN])
        above.set_title(model, loc="left", fontsize=13, fontweight="bold", pad=16)
    panels[0, 0].set_ylabel("final held-out loss, nats", fontsize=12)
    panels[1, 0].set_ylabel("change from the clean run\nof the same arm and seed", fontsize=12)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    seeds = max(len(row.losses) for row in rows)
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=7,
        frameon=False,
        fontsize=11,
        title=f"mean of {seeds} seeds with {CONFIDENCE:.0%} interval, small dots single seeds, "
        "NaN: number of diverged runs",
        title_fontsize=11,
        alignment="left",
    )
    figure.savefig(path, format="png")


def _draw_losses(axes: Axes, rows: Sequence[Row], guess: float) -> None:
    finite = [loss for row in rows for loss in row.losses if math.isfinite(loss)]
    if max(finite) > WIDE * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    _draw_rows(axes, rows, [row.loss for row in rows], [row.losses for row in rows])
    if axes.get_ylim()[1] > guess:
        axes.axhline(guess, color="0.5", linestyle="--", linewidth=1, label="uniform guess")


def _draw_changes(axes: Axes, rows: Sequence[Row]) -> None:
    changes = [
        [loss - clean for loss, clean in zip(row.losses, row.clean, strict=True)] for row in rows
    ]
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.axhline(0, color="0.5", linewidth=1)
    _draw_rows(axes, rows, [row.change for row in rows], changes)


def _draw_rows(
    axes: Axes,
    rows: Sequence[Row],
    intervals: Sequence[Interval],
    single: Sequence[Sequence[float]],
) -> None:
    corruptions, arms = names_of(rows, "corruption"), names_of(rows, "arm")
    for number, arm in enumerate(arms):
        offset = WIDTH * ((number + 0.5) / len(arms) - 0.5)
        chosen = [index for index, row in enumerate(rows) if row.arm == arm]
        positions = [corruptions.index(rows[index].corruption) + offset for index in chosen]
        color = COLORS[number % len(COLORS)]
        for position, index in zip(positions, chosen, strict=True):
            values = single[index]
            axes.plot([position] * len(values), values, ".", color=color, alpha=0.3, markersize=5)
            if rows[index].diverged:
                _mark_diverged(axes, position, rows[index], color)
        means = [intervals[index].mean for index in chosen]
        axes.errorbar(
            positions,
            means,
            yerr=[
                [intervals[index].mean - intervals[index].low for index in chosen],
                [intervals[index].high - intervals[index].mean for index in chosen],
            ],
            fmt=SHAPES[number % len(SHAPES)],
            color=color,
            markersize=6,
            capsize=3,
            linewidth=1.3,
            label=arm,
        )
    _finish(axes, corruptions)


def _mark_diverged(axes: Axes, position: float, row: Row, color: str) -> None:
    """Write the number of diverged runs above the place of their mean."""
    axes.annotate(
        f"{row.diverged} of {len(row.losses)} NaN",
        xy=(position, 1),
        xycoords=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        color=color,
        fontsize=10,
    )


def _finish(axes: Axes, corruptions: Sequence[str]) -> None:
    for edge in range(1, len(corruptions)):
        axes.axvline(edge - 0.5, color="0.9", linewidth=1)
    axes.set_xticks(range(len(corruptions)), corruptions, fontsize=10)
    axes.set_xlim(-0.5, len(corruptions) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=True, axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
