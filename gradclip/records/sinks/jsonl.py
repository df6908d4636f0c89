"""A sink that appends a line of JSON for each step to a file, for programs to read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO

from ...errors import ArgumentError
from ..logged_step import LoggedStep
from .base import CadencedSink
from .tags import PARAMETER_TAGS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


ABSENT_IF_NONE = LoggedStep._fields[LoggedStep._fields.index("parameter_norms") :]
"""The fields that few runs have."""


class JsonlSink(CadencedSink):
    """Append one line of JSON for each step to a file.

    A line is an object with the fields of `LoggedStep`; from ``parameter_norms`` on they are absent
    if they are None. Numbers that are NaN or infinite are null, as JSON has neither. A batch is
    appended in one write, so several processes may write to one file, but their steps then
    alternate, and `gradclip report` takes a file for one run. A run that continues appends to its
    file; if a step comes again, the later line counts. A line that a crash or a full disk has cut
    off is ended before the next one begins.
    <!-- test: tests/logging/test_jsonl.py -->

    Args:
        path: The file; its directory is made when the first batch is written.
        every: Write each step whose index is a multiple of this, and steps with an incident.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: How many parameter norms are written with a step: the largest ones, before
            clipping; "all" for all of them.
        per_parameter_every: Parameter norms are written at each step whose index is a multiple of
            this, and at steps with an incident.
        weights_every: Weight norms and update ratios (norm of a parameter's change, divided by its
            norm before the step) are written at each step whose index is a multiple of this; 0 for
            never. They need memory for a copy of the parameters.

    Raises:
        ArgumentError: ``path`` is not the path of a file, or a number is not positive.

    <!-- test: tests/contracts/sinks/test_contract.py; tests/logging/test_log_option.py
    -k invalid -->
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
        weights_every: int = 0,
    ) -> None:
        super().__init__(every, flush_every, per_parameter, per_parameter_every, weights_every)
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ArgumentError(f"path is a {type(path).__name__}: give the path of a file.")
        if not os.fspath(path) or os.path.isdir(path):
            raise ArgumentError(f"path is {os.fspath(path)!r}: give the path of a file.")
        self.path = self.place = os.path.realpath(path)

    def __repr__(self) -> str:
        return f"JsonlSink({self.path!r})"

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        lines = "".join(
            f"{json.dumps(_fields(step), allow_nan=False)}\n"
            for step in self.chosen(steps, incidents=True)
        )
        if not lines:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        with open(self.path, "ab+", buffering=0) as file, _locked(file):
            has_content = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0
            torn = has_content and file.read(1) != b"\n"
            content = (b"\n" if torn else b"") + lines.encode()
            if file.write(content) < len(content):  # a file without a buffer may write a part
                raise OSError(f"{self.path}: not all of the lines were written; is the disk full?")


@contextmanager
def _locked(file: FileIO) -> Iterator[None]:
    """Lock the file: else a line that another process is writing looks as if it were cut off."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
    yield  # and closing the file unlocks it


def _fields(step: LoggedStep) -> dict[str, object]:
    fields = {name: _json_number(value) for name, value in step._asdict().items()}
    for name in PARAMETER_TAGS:
        if (numbers := getattr(step, name)) is not None:
            fields[name] = {key: _json_number(number) for key, number in numbers.items()}
    for name in ABSENT_IF_NONE:
        if getattr(step, name) is None:
            del fields[name]
    return fields


def _json_number(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
