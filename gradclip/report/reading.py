"""Runs read from the paths a user names: logs of this package and of trainers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from ..errors import ArgumentError
from ..records.sinks.tags import PARAMETER_TAGS
from .run import Run, RunBuilder, as_logged_loss, warn_unreadable
from .trainer_logs import STATE, newest_states, read_state, read_table

LINES_AT_ONCE = 4096
"""Lines that are parsed as one JSON list, in half the time of parsing each line alone."""
_STEP_FIELDS = itemgetter("step", "norm", "clipped_norm", "threshold", "skipped")


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read all runs that are logged in some files and directories, with all of their steps.

    Directories are searched recursively. If a step was logged more than once, as after a resume,
    the last entry counts.

    Args:
        paths: Files of `gradclip.JsonlSink`, event files, CSV files of Lightning, states of the
            Trainer of Transformers, and directories with such files.

    Raises:
        ArgumentError: A path does not exist or holds no run, or no path was given.

    Warns:
        UserWarning: Part of a file cannot be read; the rest is read.
    """
    runs = [run for path in paths for run in _read(Path(path))]
    if not runs:
        raise ArgumentError("No runs were given: give directories or files of logs.")
    return runs


def _read(path: Path) -> list[Run]:
    if not path.exists():
        raise ArgumentError(f"{path} does not exist: give a directory or a file of logs.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    runs: list[Run] = []
    event_files: dict[Path, list[Path]] = {}
    for file in files:
        if "tfevents" in file.name:
            event_files.setdefault(file.parent if path.is_dir() else file, []).append(file)
        elif file.suffix == ".csv":
            runs += read_table(file)
        elif path.is_file() and file.suffix == ".json":
            runs += read_state(file) or read_jsonl(file)
        elif file.suffix == ".jsonl" or path.is_file():  # a file named by the user has any suffix
            runs += read_jsonl(file)
    if event_files:
        from .event_files import read_event_files  # it imports TensorBoard, which takes a second

        for name, group in sorted(event_files.items()):
            runs += read_event_files(name, group)
    if not runs:  # a Trainer writes the same to its event files
        states = newest_states(file for file in files if file.name == STATE)
        runs += [run for state in states for run in read_state(state)]
    if not runs:
        is_directory = path.is_dir()
        size = f"{len(files)} files" if is_directory else f"{path.stat().st_size} bytes"
        raise ArgumentError(
            f"{path} has no {'run' if is_directory else 'steps'} in it ({size}): give the log= of "
            "a GradientClipper, which is a directory with TensorBoard event files or a file of "
            "JsonlSink, or the log of a trainer with the tag grad_norm. A run appears there after "
            "its first batch of steps, or after close()."
        )
    return runs


def read_jsonl(path: Path) -> list[Run]:
    """Return the run in a file of `gradclip.JsonlSink`, or an empty list if it holds no step.

    The file is read piece by piece, so that its size does not matter.

    Args:
        path: The file.

    Warns:
        UserWarning: Some lines are not steps of a run.
    """
    builder, foreign_lines = RunBuilder(str(path)), 0
    with path.open("rb") as file:
        while lines := [*islice(file, LINES_AT_ONCE)]:
            if _add_lines(lines, builder):
                continue
            for line in filter(bytes.strip, lines):
                foreign_lines += not _add_lines([line], builder)
    if foreign_lines and builder:
        warn_unreadable(path, f"{foreign_lines} of its lines are not steps and were ignored")
    return [builder.run()] if builder else []


def _add_lines(lines: Sequence[bytes], builder: RunBuilder) -> bool:
    """Add the steps in some lines; return False, with none added, if one line is not a step."""
    try:
        steps = json.loads(b"[%s]" % b",".join(lines))
        if len(steps) != len(lines):  # one line held several values
            return False
        losses = [as_logged_loss(step["loss"]) if "loss" in step else math.nan for step in steps]
        fields = [(*_STEP_FIELDS(step), loss) for step, loss in zip(steps, losses, strict=True)]
        rows = np.array(fields, dtype=np.float64)  # null becomes NaN
        by_field = {
            field: {
                row: _numbers_by_name(numbers)
                for row, step in enumerate(steps)
                if (numbers := step.get(field)) is not None
            }
            for field in PARAMETER_TAGS
        }
        sentences = {
            row: str(said)
            for row, step in enumerate(steps)
            if (said := step.get("incident")) is not None
        }
        observed = bool(steps[-1].get("observed"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return False
    builder.add(rows, by_field, sentences)
    builder.observed = observed
    return True


def _numbers_by_name(numbers: dict[str, float | None]) -> dict[str, float]:
    """Return numbers as floats, null as NaN.

    Raises:
        AttributeError: ``numbers`` is not a JSON object.
        TypeError: One is not a number.
        ValueError: One is a text that is not a number.
    """
    return {name: math.nan if each is None else float(each) for name, each in numbers.items()}
