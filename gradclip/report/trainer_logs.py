"""Runs read from files of trainers' own loggers: tables of Lightning, states of Transformers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from .run import Run
from .tags import TaggedRuns, parsed_tag

STATE = "trainer_state.json"
"""The file in which the Trainer of Transformers keeps its log, in each of its checkpoints."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def read_table(path: Path) -> list[Run]:
    """Return the runs in a CSV file with a column ``step``, as Lightning's CSVLogger writes it.

    An empty list if it has no such column, or none of a norm. Cells that are empty or no numbers
    are left out: each call of a logger has written a row of its own.
    """
    runs = TaggedRuns(str(path))
    with suppress(UnicodeDecodeError, csv.Error), path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or ()
        if any(map(parsed_tag, names)):
            _add_rows(reader, names, runs)
    return runs.runs()


def read_state(path: Path) -> list[Run]:
    """Return the runs in the ``log_history`` of a JSON file; an empty list if it has none."""
    runs = TaggedRuns(str(path))
    with suppress(UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        history = content.get("log_history") if isinstance(content, dict) else None
        history = history if isinstance(history, list) else []
        entries = [entry for entry in history if isinstance(entry, dict)]
        names = {name for entry in entries for name in entry}
        if any(map(parsed_tag, names)):
            _add_rows(entries, names, runs)
    return runs.runs()


def newest_states(files: Iterable[Path]) -> list[Path]:
    """Return the last state of each run, which holds its whole log."""
    newest: dict[Path, tuple[int, Path]] = {}
    for file in files:
        checkpoint = _CHECKPOINT.fullmatch(file.parent.name)
        folder = file.parent.parent if checkpoint else file.parent
        # The state beside the checkpoints is that of the end.
        step = int(checkpoint[1]) if checkpoint else 1 << 62
        newest[folder] = max(newest.get(folder, (-1, file)), (step, file))
    return [file for _, file in newest.values()]


def _add_rows(rows: Iterable[Mapping[str, object]], names: Iterable[str], runs: TaggedRuns) -> None:
    """Add the numbers of rows under the names of their columns, all but the step itself."""
    wanted = sorted({*names} - {"step"})
    for row in rows:
        step = _number(row.get("step"))
        numbers = {tag: number for tag in wanted if (number := _number(row.get(tag))) is not None}
        if step is not None and step.is_integer():
            runs.add(int(step), numbers)


def _number(cell: object) -> float | None:
    """Return a cell as a number; None if it is none."""
    if isinstance(cell, str | int | float) and not isinstance(cell, bool):
        with suppress(ValueError, OverflowError):
            return float(cell)
    return None
