"""From what a user names to runs: files of `JsonlSink`, directories of `TensorBoardSink`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import ArgumentError
from .jsonl import read_jsonl
from .run import Run


def read_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """Read every run that is logged in some files and directories, all of its steps.

    A directory is searched with all that are in it. Where a step was logged more than once the
    later counts, as after a run was resumed.

    Args:
        paths: Files that `gradclip.JsonlSink` wrote, event files, and directories.

    Raises:
        ArgumentError: One of them is not there or holds no run.

    Warns:
        UserWarning: Part of a file cannot be read; the rest is.
    """
    runs = [run for path in paths for run in _read(Path(path))]
    if not runs:
        raise ArgumentError("No runs were given: give directories or files of logs.")
    return runs


def _read(path: Path) -> list[Run]:
    if not path.exists():
        raise ArgumentError(f"{path} is not there: give a directory or a file of logs.")
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    runs: list[Run] = []
    events: dict[Path, list[Path]] = {}
    for file in files:
        if "tfevents" in file.name:
            events.setdefault(file.parent if path.is_dir() else file, []).append(file)
        elif file.suffix == ".jsonl" or path.is_file():
            runs += read_jsonl(file)
    if events:
        from .event_files import read_event_files  # not at the top: it imports TensorBoard

        for name, together in sorted(events.items()):
            runs += read_event_files(name, together)
    if not runs:
        what = "no run in it" if path.is_dir() else "no steps in it"
        seen = f" ({len(files)} files)" if path.is_dir() else f" ({path.stat().st_size} bytes)"
        raise ArgumentError(
            f"{path} has {what}{seen}: give what log= of a GradientClipper was, a directory with "
            "event files of TensorBoard or a file of JsonlSink. A run is there after its first "
            "batch of steps, or close()."
        )
    return runs
