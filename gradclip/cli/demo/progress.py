"""Progress of the training runs, shown on stderr as bars or lines."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ...report.printing import number

if TYPE_CHECKING:
    from typing_extensions import Self


class Progress(Protocol):
    """Shows the progress of one training after the other, within a ``with`` block."""

    def begin(self, title: str, steps: int) -> None:
        """Called before the first step of a training."""

    def advance(self, loss: float) -> None:
        """Called after each step with its loss."""


def progress(stream: TextIO) -> AbstractContextManager[Progress]:
    """Return bars on a terminal if rich is installed, else plain lines."""
    if stream.isatty():
        try:
            return Bars(stream)
        except ImportError:
            pass
    return Lines(stream)


class Bars:
    """A bar for each training, drawn by rich."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description:16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:>5}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=stream),
        )

    def begin(self, title: str, steps: int) -> None:
        """See `Progress.begin`."""
        self._task = self._bars.add_task(title, total=steps, loss="")

    def advance(self, loss: float) -> None:
        """See `Progress.advance`."""
        self._bars.update(self._task, advance=1, loss=number(loss))

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.stop()


class Lines:
    """One line a training that is rewritten in a terminal; elsewhere, as in a file, four lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._rewrites = stream.isatty()
        self._unfinished = False

    def begin(self, title: str, steps: int) -> None:
        """See `Progress.begin`."""
        self._title, self._steps, self._step = title, steps, 0
        self._shown = time.monotonic()

    def advance(self, loss: float) -> None:
        """See `Progress.advance`."""
        self._step += 1
        if self._is_due():
            line = f"{self._title}: {self._step}/{self._steps} steps, loss {number(loss)}"
            last = self._step == self._steps
            rewritten = self._rewrites and not last
            self._stream.write(f"\r{line:<60}" if self._rewrites else line)
            self._stream.write("" if rewritten else "\n")
            self._stream.flush()
            self._unfinished = rewritten

    def _is_due(self) -> bool:
        """Return whether to show this step: the last one, each quarter, or after 0.1 s."""
        if self._step == self._steps:
            return True
        if not self._rewrites:
            return self._step * 4 // self._steps > (self._step - 1) * 4 // self._steps
        now = time.monotonic()
        if now - self._shown < 0.1:
            return False
        self._shown = now
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._unfinished:
            self._stream.write("\n")
