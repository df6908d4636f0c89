"""Destinations of logged steps, one a file."""

from __future__ import annotations

import os

from ..errors import ArgumentError
from ..ranks import is_first
from ..records import Sink
from .callable import CallableSink
from .jsonl import JsonlSink
from .memory import MemorySink
from .tensorboard import TensorBoardSink

__all__ = ["CallableSink", "JsonlSink", "MemorySink", "Sink", "TensorBoardSink", "sinks_from"]


def sinks_from(log: object) -> list[Sink]:
    """Return the sinks that a user's ``log=`` means.

    Raises:
        ArgumentError: It is none of directory, SummaryWriter, `Sink`, list of these, and None.
    """
    if log is None:
        return []
    if isinstance(log, list | tuple):
        return [sink for entry in log for sink in sinks_from(entry)]
    if isinstance(log, Sink):
        return [log]
    if isinstance(log, str | os.PathLike) or hasattr(log, "add_scalar"):
        sink = TensorBoardSink(log)  # type: ignore[arg-type]  # checked there
        # A directory is one run's: of several processes that are given it the first one writes.
        return [sink] if is_first() or hasattr(log, "add_scalar") else []
    what = f"the class {log.__name__}" if isinstance(log, type) else f"a {type(log).__name__}"
    raise ArgumentError(
        f"log is {what}: give a directory, a SummaryWriter, a Sink, or a list of these."
    )
