"""Results of trainings with corrupted gradients as Markdown; all sentences follow from numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from benchmarks.common.markdown import table
from benchmarks.experiments.spikes.outcomes import (
    CLEAN,
    CONFIDENCE,
    UNCLIPPED,
    Interval,
    Pilot,
    Row,
    difference,
    names_of,
)


def report(
    settings: Mapping[str, str],
    code: Mapping[str, str],
    pilots: Sequence[Pilot],
    chosen: Mapping[str, Pilot],
    rows: Sequence[Row],
) -> list[str]:
    """Return lines of Markdown.

    Args:
        settings: Settings of the trainings.
        code: Code of each arm.
        pilots: All pilot runs.
        chosen: The chosen pilot run of each model.
        rows: The results.
    """
    of_intervals = (
        f"Intervals are Student's t over seeds at {CONFIDENCE:.0%}, none corrected for their "
        f"number: of {len(rows)} rows about {len(rows) * (1 - CONFIDENCE):.0f} would differ by "
        "chance. Changes and comparisons are paired by seed. A run whose loss is not finite "
        "diverged: it is counted, and in no mean."
    )
    lines = [
        "# What a few bad gradients do, by the way they are clipped",
        "",
        *(f"- {what}: {how}" for what, how in settings.items()),
        "",
        "| arm | written |\n|---|---|",
        *(f"| {arm} | `{written}` |" for arm, written in code.items()),
        "",
        *_pilots(pilots, chosen),
        "",
        of_intervals,
    ]
    for model in names_of(rows, "model"):
        of_model = [row for row in rows if row.model == model]
        lines += ["", f"## {model}", "", *_findings(of_model), "", *_table(of_model)]
    return lines


def _pilots(pilots: Sequence[Pilot], chosen: Mapping[str, Pilot]) -> list[str]:
    how = (
        "Clean runs without clipping of a seed that is not used again; the learning rate with the "
        "lowest loss is taken. The fixed threshold is the number that `gradclip report` names "
        "for its norms; where it names none, the median norm."
    )
    lines = [
        how,
        "",
        "| model | learning rate | loss | kind of run | number | median norm | taken |",
        "|---|---|---|---|---|---|---|",
    ]
    for pilot in pilots:
        advised = "none" if pilot.advised is None else f"{pilot.advised:g}"
        taken = f"threshold {pilot.fixed:.3g}" if chosen[pilot.model] is pilot else ""
        loss = _loss(pilot.loss) if math.isfinite(pilot.loss) else "diverged"
        lines.append(
            f"| {pilot.model} | {pilot.rate:g} | {loss} | {pilot.kind} | {advised} | "
            f"{pilot.median:.3g} | {taken} |"
        )
    return lines


def _table(rows: Sequence[Row]) -> list[str]:
    head = (
        *("corrupted", "clipping", "final loss", "interval", "change from its clean run"),
        *("interval", "diverged", "steps clipped", "steps skipped"),
    )
    lines = []
    for corruption in names_of(rows, "corruption"):
        for row in (row for row in rows if row.corruption == corruption):
            clean = corruption == CLEAN
            change = ("", "") if clean else _cells(row.change, _change)
            line = [
                corruption,
                row.arm,
                *(_cells(row.loss, _loss) if row.diverged < len(row.losses) else ("diverged", "")),
                *change,
                f"{row.diverged} of {len(row.losses)}",
                "" if row.arm == UNCLIPPED else f"{row.clip_rate:.1%}",
                f"{row.skipped:g}",
            ]
            lines.append(line)
    return table(head, lines)


def _findings(rows: Sequence[Row]) -> list[str]:
    """Return the findings for one model, by corruption."""
    lines = []
    for corruption in names_of(rows, "corruption"):
        of_one = [row for row in rows if row.corruption == corruption]
        if corruption == CLEAN:
            plain = next(row for row in of_one if row.arm == UNCLIPPED)
            against = {row.arm: difference(row.losses, plain.losses) for row in of_one}
            del against[UNCLIPPED]
            what = f"beside {UNCLIPPED}"
        else:
            against = {row.arm: row.change for row in of_one}
            what = "beside their own clean runs"
        found = [*_diverged(of_one), *_sides(against, what), _lowest(of_one)]
        lines += [f"- **{corruption}**", *(f"  - {each}" for each in found)]
    return lines


def _diverged(rows: Sequence[Row]) -> list[str]:
    found = [f"{row.arm} ({row.diverged} of {len(row.losses)})" for row in rows if row.diverged]
    return [f"diverged: {', '.join(found)}"] if found else []


def _sides(changes: Mapping[str, Interval], what: str) -> list[str]:
    words = {1: f"higher loss {what}", -1: f"lower loss {what}", 0: f"no difference shown {what}"}
    found = []
    for side, word in words.items():
        those = [
            f"{arm} ({_change(change.mean)}, higher in {change.above} of {change.count} seeds)"
            for arm, change in changes.items()
            if change.sign == side and math.isfinite(change.mean)
        ]
        found += [f"{word}: {', '.join(those)}"] if those else []
    return found


def _lowest(rows: Sequence[Row]) -> str:
    """Return the arm with the lowest loss of those that never diverged, and its equals."""
    whole = [row for row in rows if not row.diverged]
    if not whole:
        return "every arm diverged at least once"
    best = min(whole, key=lambda row: row.loss.mean)
    others = [row for row in whole if row is not best]
    close = [row.arm for row in others if difference(row.losses, best.losses).sign == 0]
    beside = f", not told apart from {', '.join(close)}" if close else ""
    return f"lowest final loss {best.arm} ({_loss(best.loss.mean)}){beside}"


def _cells(found: Interval, shown: Callable[[float], str]) -> tuple[str, str]:
    if math.isnan(found.mean):
        return "", ""
    return shown(found.mean), f"{shown(found.low)} to {shown(found.high)}"


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _change(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 100 else f"{value:+.3g}"
