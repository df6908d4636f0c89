"""The ``log=`` option: what a user may give, and the sinks that it stands for."""

from __future__ import annotations

import os
from typing import Any

from ...errors import ArgumentError
from ...ranks.groups import is_first
from .base import Sink
from .tensorboard import TensorBoardSink

KINDS = (str, os.PathLike, Sink)
"""What ``log=`` may be, beside writers and lists."""


def check_log(log: object) -> None:
    """Refuse what cannot be a user's ``log=``; nothing is opened.

    Raises:
        ArgumentError: It is none of directory, SummaryWriter, `Sink`, list of these, and None.
    """
    if isinstance(log, list | tuple):
        for entry in log:
            check_log(entry)
    elif not (log is None or isinstance(log, KINDS) or hasattr(log, "add_scalar")):
        what = f"the class {log.__name__}" if isinstance(log, type) else repr(log)
        raise ArgumentError(
            f"log is {what}: give a directory, a SummaryWriter, a Sink, a list of these, or None."
        )


def sinks_from(log: Any) -> list[Sink]:
    """Return the sinks that a user's ``log=`` means.

    Raises:
        ArgumentError: See `check_log`.
    """
    check_log(log)
    if log is None:
        return []
    if isinstance(log, list | tuple):
        return [sink for entry in log for sink in sinks_from(entry)]
    if isinstance(log, Sink):
        return [log]
    sink = TensorBoardSink(log)  # whatever is wrong with it is so for every process
    # A directory is one run's: of several processes that are given it the first one writes.
    return [sink] if hasattr(log, "add_scalar") or is_first() else []
