"""Tables for people, on a terminal or in a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TextIO


def number(value: float) -> str:
    """Return a number with three digits, and NaN as people write it."""
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, title: str | None = None
) -> None:
    """Print a table with rich where it is installed, else as aligned text.

    Args:
        header: Names of the columns.
        rows: As long as the header; the first cell of each to the left, the others to the right.
        stream: Where to.
        title: What stands above.
    """
    if title is not None:
        print(title, file=stream)
    try:
        _print_rich(header, rows, stream)
    except ImportError:
        _print_plain(header, rows, stream)


def _print_rich(header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(file=stream).print(table)


def _print_plain(header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells).rstrip(), file=stream)
