"""Steps as lines of JSON, for programs."""

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

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class JsonlSink(CadencedSink):
    """Append one line of JSON for each step to a file.

    A line is an object with the fields of `LoggedStep`, the last two where there is something to
    say; numbers that are NaN or infinite are null, as JSON has none. A batch is appended in one
    write, so that several processes may write to one file, though their steps then lie between each
    other; `gradclip report` takes a file for one run. A run that continues appends to its file:
    where a step comes again, the later line counts. What a crash or a full disk has left of a line
    is ended before the next one.

    Args:
        path: The file; its directory is made when the first batch is written.
        every: Write each step whose index is a multiple of this, and those that there is something
            to say of: `LoggedStep.incident`.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: Of how many parameters the norms are written, before clipping: the largest of
            the moment; "all" for all.
        per_parameter_every: Of the steps that are written, those whose norms by parameter are: each
            whose index is a multiple of this, and those that there is something to say of.

    Raises:
        ArgumentError: ``path`` is no path, or a number is not positive.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
    ) -> None:
        super().__init__(every, flush_every, per_parameter, per_parameter_every)
        if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
            raise ArgumentError(f"path is a {type(path).__name__}: give the path of a file.")
        if not os.fspath(path) or os.path.isdir(path):
            raise ArgumentError(f"path is {os.fspath(path)!r}: give the path of a file.")
        self.path = os.path.realpath(path)

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
            begun = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) >= 0
            torn = begun and file.read(1) != b"\n"
            content = (b"\n" if torn else b"") + lines.encode()
            if file.write(content) < len(content):
                raise OSError(f"{self.path}: not all of the lines were written; is the disk full?")


@contextmanager
def _locked(file: FileIO) -> Iterator[None]:
    """Keep a line that another process is just writing from looking like one that was torn."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
    yield  # and closing the file unlocks it


def _fields(step: LoggedStep) -> dict[str, object]:
    fields = {name: _known(value) for name, value in step._asdict().items()}
    if step.parameter_norms is None:
        del fields["parameter_norms"]
    else:
        fields["parameter_norms"] = {k: _known(norm) for k, norm in step.parameter_norms.items()}
    if step.incident is None:
        del fields["incident"]
    return fields


def _known(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
