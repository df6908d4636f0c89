"""Both runs in numbers, shown on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from .curves import LAST, Curves, number

HEADER = ("", "final loss", "largest norm", "clip rate", "steps/s")


def show_table(runs: Sequence[Curves], max_norm: float, stream: TextIO) -> None:
    """Print the table with rich where it is installed, else as aligned text."""
    rows = [_row(curves) for curves in runs]
    try:
        _print_rich(rows, stream)
    except ImportError:
        _print_plain(rows, stream)
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


def _print_rich(rows: list[tuple[str, ...]], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(file=stream).print(table)


def _print_plain(rows: list[tuple[str, ...]], stream: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for row in (HEADER, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells), file=stream)
