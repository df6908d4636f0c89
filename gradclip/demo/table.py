"""Both runs in numbers, shown on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from ..report.printing import number, print_table
from .curves import LAST, Curves

HEADER = ("", "final loss", "largest norm", "clip rate", "steps/s")


def show_table(runs: Sequence[Curves], max_norm: float, stream: TextIO) -> None:
    """Print the table with rich where it is installed, else as aligned text."""
    rows = [_row(curves) for curves in runs]
    print_table(HEADER, rows, stream)
    span = f"the last {LAST} steps" if len(runs[0].losses) > LAST else "all steps"
    print(
        f"Final loss: mean of {span}. Clip rate: share of the finite norms above "
        f"{max_norm:g}\n(in brackets: only observed, no gradient was changed).",
        file=stream,
    )


def _row(curves: Curves) -> tuple[str, ...]:
    largest = number(curves.largest_norm)
    if curves.nonfinite_norms:
        largest += f", {curves.nonfinite_norms} NaN/inf"
    rate = f"{curves.clip_rate:.0%}" if curves.clips else f"({curves.clip_rate:.0%})"
    speed = f"{curves.steps_per_second:.0f}"
    return curves.title, number(curves.final_loss), largest, rate, speed
