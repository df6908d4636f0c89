"""Norm curves in TensorBoard.

A directory is written through TensorBoard's own record writer, a batch at a time: a third of
what ``SummaryWriter.add_scalar`` costs the training loop. All sinks on one directory share
one event file.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary

from ..checks import checked_count
from ..errors import ArgumentError, NotAvailableError
from ..records import LoggedStep, Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOADED_AT = time.time()
_file_numbers = itertools.count()


class TensorBoardSink(Sink):
    """Write scalars for TensorBoard, every step with its own wall time.

    The tags are ``grad_norm/pre``, ``grad_norm/post``, ``grad_norm/threshold`` (where there is
    one), ``grad_norm/clip_rate``, ``grad_norm/nonfinite_steps`` and ``grad_norm/skipped_steps``.
    A second sink on the same directory or writer writes ``grad_norm_2/...``, and so on.

    The directory and its event file are made when the first batch is written. A run that does
    not begin at step 0 continues the curves in its directory: later points of an earlier run
    are dropped by TensorBoard.

    Args:
        where: A local directory, or a ``SummaryWriter``, which stays open at `close`.
        every: Write each step whose index is a multiple of this.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: Not available in this version.

    Raises:
        ArgumentError: ``where`` is no local directory or writer, or a number is not positive.
        NotAvailableError: ``per_parameter`` is not 0.
    """

    def __init__(
        self,
        where: str | os.PathLike[str] | SummaryWriter,
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
    ) -> None:
        if per_parameter != 0:
            raise NotAvailableError(
                f"per_parameter={per_parameter!r} is not available in this version of gradclip: "
                "leave it at 0."
            )
        self.every = checked_count("every", every, 1)
        self.flush_every = checked_count("flush_every", flush_every, 1)
        self._file = _destination(where)
        self._file.sinks.add(self)
        self._prefix = _free_prefix(self._file.sinks)

    def __repr__(self) -> str:
        return f"TensorBoardSink({self._file.where!r})"

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        self._file.write(
            [
                (step.step, step.wall_time, list(self._scalars(step)))
                for step in steps
                if step.step % self.every == 0
            ]
        )

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._file.flush()

    def close(self) -> None:
        """Close the event file; a ``SummaryWriter`` is flushed and stays open."""
        self._file.sinks.discard(self)
        if not self._file.sinks:
            self._file.close()

    def _scalars(self, step: LoggedStep) -> Iterator[tuple[str, float]]:
        yield f"{self._prefix}/pre", step.norm
        yield f"{self._prefix}/post", step.clipped_norm
        if step.threshold is not None:
            yield f"{self._prefix}/threshold", step.threshold
        yield f"{self._prefix}/clip_rate", step.clip_rate
        yield f"{self._prefix}/nonfinite_steps", float(step.nonfinite_steps)
        yield f"{self._prefix}/skipped_steps", float(step.skipped_steps)


def _free_prefix(sinks: WeakSet[TensorBoardSink]) -> str:
    taken = {getattr(sink, "_prefix", None) for sink in sinks}
    names = itertools.chain(["grad_norm"], (f"grad_norm_{n}" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)


Events = list[tuple[int, float, list[tuple[str, float]]]]
"""Steps, each with its index, wall time and tagged scalars."""


class _EventFile:
    """One event file in a directory, shared by all sinks on it."""

    def __init__(self, directory: str) -> None:
        self.where = directory
        self.sinks: WeakSet[TensorBoardSink] = WeakSet()
        self._stream: Any = None
        self._begun = False

    def write(self, events: Events) -> None:
        if not events:
            return
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            if self._stream is None:
                self._open(events[0][0])
            for step, wall_time, scalars in events:
                event = Event(step=step, wall_time=wall_time)
                for tag, value in scalars:
                    event.summary.value.add(tag=tag, simple_value=value)
                self._record(event)
            self._stream.flush()
        except OSError:
            # What the file holds beyond here can't be known: the next batch begins a new one.
            self._abandon()
            raise

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _open(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        os.makedirs(self.where, exist_ok=True)
        continued = (
            not self._begun
            and step > 0
            and any("tfevents" in name for name in os.listdir(self.where))
        )
        # Readers take files in the order of their names. With the time at which this process
        # began, a restart drops points of earlier processes and none of its own.
        name = f"events.out.tfevents.{int(_LOADED_AT):010d}.{socket.gethostname()}.{os.getpid()}"
        path = os.path.join(self.where, f"{name}.{next(_file_numbers):04d}.gradclip")
        self._stream = open(path, "xb")  # noqa: SIM115  # stays open between batches
        self._begun = True
        self._record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if continued:
            start = SessionLog(status=SessionLog.START)
            self._record(Event(wall_time=time.time(), step=step, session_log=start))

    def _record(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter(self._stream).write(event.SerializeToString())

    def _abandon(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            try:
                stream.close()
            except OSError:
                pass


class _Writer:
    """A user's SummaryWriter, which stays the user's."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.where = writer
        self.sinks: WeakSet[TensorBoardSink] = WeakSet()

    def write(self, events: Events) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        file_writer = self.where._get_file_writer()
        for step, wall_time, scalars in events:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
            file_writer.add_summary(Summary(value=values), step, wall_time)
        self.where.flush()

    def flush(self) -> None:
        self.where.flush()

    def close(self) -> None:
        self.where.flush()


_files: WeakValueDictionary[str, _EventFile] = WeakValueDictionary()
_writers: WeakValueDictionary[int, _Writer] = WeakValueDictionary()


def _destination(where: object) -> _EventFile | _Writer:
    if hasattr(where, "add_scalar") and hasattr(where, "_get_file_writer"):
        return _writers.setdefault(id(where), _Writer(where))  # type: ignore[arg-type]
    if not isinstance(where, str | os.PathLike):
        raise ArgumentError(
            f"where is a {type(where).__name__}: give a directory or a SummaryWriter."
        )
    directory = os.fspath(where)
    if not isinstance(directory, str) or not directory or "://" in directory:
        raise ArgumentError(
            f"where is {directory!r}: give a local directory, or a SummaryWriter made for it."
        )
    path = os.path.realpath(directory)
    return _files.setdefault(path, _EventFile(path))
