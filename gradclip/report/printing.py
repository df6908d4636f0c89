"""The printed report of runs, and the tables and numbers that other commands print as well."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TextIO

from .advice import Advice, advised
from .losses import LossSummary
from .run import Run
from .summary import Summary, summarized


def print_report(runs: Sequence[Run], stream: TextIO, *, as_json: bool = False) -> list[Advice]:
    """Print the facts of each run and the threshold to choose.

    Args:
        runs: The runs.
        stream: Receives the report.
        as_json: Whether to print one JSON list instead of tables. NaN and infinity become null.

    Returns:
        The advice for each run: `pictures` draw it, and it takes a while to find.
    """
    reports = [(summary := summarized(run), advised(run, summary)) for run in runs]
    if as_json:
        content = [
            json_value({**asdict(summary), "advice": asdict(advice)}) for summary, advice in reports
        ]
        print(json.dumps(content, indent=2, allow_nan=False), file=stream)
    else:
        for index, (summary, advice) in enumerate(reports):
            if index:
                print(file=stream)
            _print_run(summary, advice, stream)
    return [advice for _, advice in reports]


def _print_run(summary: Summary, advice: Advice, stream: TextIO) -> None:
    quantiles = {f"{percent:g} %": number(norm) for percent, norm in summary.quantiles.items()}
    clipped = "would have been clipped" if summary.observed else "clipped"
    facts = {
        "steps": f"{summary.steps:,} ({summary.first_step:,} to {summary.last_step:,})",
        clipped: "not logged" if math.isnan(summary.clip_rate) else f"{summary.clip_rate:.2%}",
        **{f"norm, {percent}": norm for percent, norm in quantiles.items()},
        "largest norm": number(summary.largest),
        "spikes": f"{summary.spikes:,}",
        "not finite": f"{summary.nonfinite_steps:,}",
        "skipped": f"{summary.skipped_steps:,}",
        "last quarter / first": number(summary.trend),
        **_facts_of_losses(summary.losses),
    }
    print_table(("", "value"), [*facts.items()], stream, summary.name)
    if summary.largest_spikes:
        rows = [
            (f"{spike.step:,}", number(spike.norm), number(spike.usual))
            for spike in summary.largest_spikes
        ]
        print_table(("largest spikes, at step", "norm", "median before"), rows, stream)
    if summary.losses is not None and summary.losses.largest_spikes:
        rows = [
            (f"{spike.step:,}", number(spike.loss), number(spike.usual))
            for spike in summary.losses.largest_spikes
        ]
        print_table(("largest loss spikes, at step", "loss", "mean before"), rows, stream)
    if advice.shares:
        shares = [(number(limit), f"{share:.2%}") for limit, share in advice.shares.items()]
        print_table(("threshold", "would have clipped"), shares, stream)
        print(
            f"Half to ten times the usual norm (Pascanu 2013): {number(advice.usual / 2)} to "
            f"{number(advice.usual * 10)}.\nMedian plus ten median deviations: "
            f"{number(summary.spike_line)}.",
            file=stream,
        )
    for warning in advice.warnings:
        print(f"Note: {warning}", file=stream)
    kind = "" if advice.kind == "unknown" else f"This run is {advice.kind}. "
    confidence = f"Confidence: {advice.confidence.level}. {advice.confidence.reason}"
    print(f"{kind}{advice.reason}\n{confidence}\n\n    {advice.line}", file=stream)


def _facts_of_losses(losses: LossSummary | None) -> dict[str, str]:
    if losses is None:
        return {}
    return {
        "last loss": "none finite" if losses.last is None else number(losses.last),
        "loss spikes": f"{losses.spikes:,} ({losses.spike_rate:.2%})",
        "losses not finite": f"{losses.nonfinite:,}",
    }


def json_value(value: object) -> object:
    """Return a value as JSON can hold it: keys as text, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [*map(json_value, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float) -> str:
    """Return a number with three digits, and NaN in its usual spelling."""
    return "NaN" if math.isnan(value) else f"{value:.3g}"


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, title: str | None = None
) -> None:
    """Print a table, with rich if it is installed, else as aligned text.

    Args:
        header: Names of the columns.
        rows: Cells of each row. The first column is aligned left, the others right.
        stream: Receives the table.
        title: A line above the table.
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
        table.add_row(*map(Text, row))  # as Text: a cell with [brackets] is not markup
    Console(file=stream).print(table)


def _print_plain(header: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells).rstrip(), file=stream)
