"""The report of runs, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TextIO

from .advice import Advice, advised
from .printing import number, print_table
from .run import Run
from .summary import Summary, summarized


def show_report(runs: Sequence[Run], stream: TextIO, *, as_json: bool = False) -> list[Advice]:
    """Print what the norms of each run were, and which threshold to take.

    Args:
        runs: The runs.
        stream: Where to.
        as_json: Whether as one list in JSON, in which NaN and infinity are null.

    Returns:
        What to do after each run, which takes a while to find.
    """
    found = [(summary := summarized(run), advised(run, summary)) for run in runs]
    if as_json:
        content = [_plain({**asdict(summary), "advice": asdict(a)}) for summary, a in found]
        print(json.dumps(content, indent=2, allow_nan=False), file=stream)
    else:
        for place, (summary, advice) in enumerate(found):
            if place:
                print(file=stream)
            _show(summary, advice, stream)
    return [advice for _, advice in found]


def _show(summary: Summary, advice: Advice, stream: TextIO) -> None:
    quantiles = {f"{percent:g} %": number(norm) for percent, norm in summary.quantiles.items()}
    facts = {
        "steps": f"{summary.steps:,} ({summary.first_step:,} to {summary.last_step:,})",
        "clipped": f"{summary.clip_rate:.2%}",
        **{f"norm, {percent}": norm for percent, norm in quantiles.items()},
        "largest": number(summary.largest),
        "spikes": f"{summary.spikes:,}",
        "not finite": f"{summary.nonfinite_steps:,}",
        "skipped": f"{summary.skipped_steps:,}",
        "last quarter / first": number(summary.trend),
    }
    print_table(("", "value"), [*facts.items()], stream, summary.name)
    if summary.largest_spikes:
        rows = [
            (f"{spike.step:,}", number(spike.norm), number(spike.usual))
            for spike in summary.largest_spikes
        ]
        print_table(("largest spikes, at step", "norm", "median before"), rows, stream)
    if advice.shares:
        shares = [(number(limit), f"{share:.2%}") for limit, share in advice.shares.items()]
        print_table(("threshold", "would have clipped"), shares, stream)
        print(
            f"Half to ten times the usual norm (Pascanu 2013): {number(advice.usual / 2)} to "
            f"{number(advice.usual * 10)}.\nMedian and ten median deviations: "
            f"{number(summary.spike_line)}.",
            file=stream,
        )
    for warning in advice.warnings:
        print(f"Note: {warning}", file=stream)
    print(f"This run is {advice.kind}. {advice.reason}\n\n    {advice.line}", file=stream)


def _plain(value: object) -> object:
    """Return what JSON can hold."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [*map(_plain, value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
