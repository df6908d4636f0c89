"""Checks the ``log=`` option and turns it into sinks."""

from __future__ import annotations

import os
from typing import Any

from ...errors import ArgumentError
from ...ranks.groups import is_first
from .base import Sink
from .tensorboard import TensorBoardSink

KINDS = (str, os.PathLike, Sink)
"""Types that ``log=`` may have, beside writers and lists."""


def check_log(log: object) -> None:
    """Refuse an invalid ``log=``; nothing is opened.

    Raises:
        ArgumentError: It is no directory, SummaryWriter, `Sink`, list of these, or None.
    """
    if isinstance(log, list | tuple):
        for entry in log:
            check_log(entry)
    elif not (log is None or isinstance(log, KINDS) or hasattr(log, "add_scalar")):
        given = f"the class {log.__name__}" if isinstance(log, type) else repr(log)
        raise ArgumentError(
            f"log is {given}: give a directory, a SummaryWriter, a Sink, a list of these, or None."
        )


def sinks_from(log: Any) -> list[Sink]:
    """Return the sinks for a ``log=``.

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
    sink = TensorBoardSink(log)  # on every rank, so that an invalid one is refused on every rank
    # A directory shows one run: if several processes get the same one, only the first writes.
    return [sink] if hasattr(log, "add_scalar") or is_first() else []
