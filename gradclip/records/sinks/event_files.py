"""Writes events for TensorBoard to an event file in a directory, or to a user's SummaryWriter."""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING

from ...errors import ArgumentError
from .tfrecord import framed

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_OUR_NAME = re.compile(r"events\.out\.tfevents\.(\d+)\..*-gradclip")

Point: TypeAlias = tuple[int, float, Sequence[tuple[str, float]], str | None]
"""Index of a step, its wall time, its values by tag, and its incident."""


class Destination(ABC):
    """A destination that writes points as events."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._last_steps: dict[str, int] = {}
        self._opened: set[str] = set()
        self._current: dict[str, frozenset[str]] = {}
        """Tags written since the restart, for curves that fell back to an earlier step."""

    def write(
        self,
        curves: str,
        points: Sequence[Point],
        opening: Callable[[int, float], Sequence[Event]] = lambda step, wall_time: (),
    ) -> None:
        """Write points, safe from a crash of this process.

        Args:
            curves: Prefix of the tags. If the step falls back, the curves restart there, and
                readers drop their later points.
            points: In the order of the steps, at least one.
            opening: Makes the events that come once before them, from the first step and its time.
        """
        last = self._last_steps.get(curves)
        first, begun, *_ = points[0]
        events = [] if curves in self._opened else [*opening(first, begun)]
        current = self._current.get(curves)
        for step, wall_time, scalars, incident in points:
            event = _event(step, wall_time, scalars)
            if self._continues if last is None else step <= last:
                current = frozenset()
            if incident is not None:
                event.summary.value.append(text(f"{curves}/incidents", incident))
            if current is None:
                events.append(event)
            else:
                tags = current | {value.tag for value in event.summary.value}
                events += [event] if tags == current else _restarted(event)
                current = tags
            last = step
        self._put(events)
        self._last_steps[curves] = points[-1][0]
        self._opened.add(curves)
        if current is not None:
            self._current[curves] = current

    def reopen(self, curves: str) -> None:
        """Let the opening events come again before the next points of these curves."""
        self._opened.discard(curves)

    @abstractmethod
    def close(self) -> None:
        """Release the file, if it is ours."""

    @property
    @abstractmethod
    def _continues(self) -> bool:
        """Whether an earlier run has written to the directory."""

    @abstractmethod
    def _put(self, events: Sequence[Event]) -> None: ...


class EventFile(Destination):
    """An event file of our own, made with the first events and shared by all sinks on a directory.

    After a failed write, the end of the file is unknown, so a new file is begun.

    Args:
        directory: Made if it is not there.
        since: The least number in the file's name, in whole seconds since the epoch.
    """

    def __init__(self, directory: str, since: int) -> None:
        super().__init__(directory)
        self._since = since
        self._stream: BinaryIO | None = None

    @cached_property
    def _earlier(self) -> list[int]:
        """The numbers in the names of our earlier files."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return [int(found[1]) for name in names if (found := _OUR_NAME.fullmatch(name))]

    @cached_property
    def _numbers(self) -> Iterator[int]:
        # Readers take files in the order of their names, so ours come after our earlier ones.
        return itertools.count(max([self._since, *(number + 1 for number in self._earlier)]))

    @property
    def _continues(self) -> bool:
        return bool(self._earlier)

    def _put(self, events: Sequence[Event]) -> None:
        removed = self._stream is not None and os.fstat(self._stream.fileno()).st_nlink == 0
        if removed:
            self._drop()
        if self._stream is None:
            self._begin(events)
        else:
            self._append(self._stream, events)
        if removed:
            raise FileNotFoundError(
                errno.ENOENT, "event file was removed, a new file goes on", self.directory
            )

    def close(self) -> None:
        """Close the file; events that come later begin a new one."""
        if self._stream is not None:
            stream, self._stream = self._stream, None
            stream.close()

    def _begin(self, events: Sequence[Event]) -> None:
        os.makedirs(self.directory, exist_ok=True)
        name = f"{next(self._numbers):010d}.{socket.gethostname()}.{os.getpid()}-gradclip"
        path = os.path.join(self.directory, f"events.out.tfevents.{name}")
        self._stream = open(path, "xb")  # noqa: SIM115  # stays open between batches
        try:
            version = Event(wall_time=time.time(), file_version="brain.Event:2")
            self._append(self._stream, [version, *events])
        except BaseException:
            with suppress(OSError):
                os.unlink(path)  # or each batch would leave an empty file on a full disk
            raise

    def _append(self, stream: BinaryIO, events: Sequence[Event]) -> None:
        records = framed([event.SerializeToString() for event in events])
        try:
            stream.write(records)
            stream.flush()
        except BaseException as error:  # also an interrupt: no reader gets past half a record
            self._drop()
            if isinstance(error, OSError):
                error.filename = stream.name  # a failed write names no file
            raise

    def _drop(self) -> None:
        self._opened.clear()  # the next file needs the layout and the settings, too
        with suppress(OSError):
            self.close()


class WriterFile(Destination):
    """The SummaryWriter of a user, which only the user closes."""

    def __init__(self, writer: SummaryWriter) -> None:
        super().__init__(os.path.realpath(writer.get_logdir()))
        self._writer = writer
        self._last_steps = _last_steps.setdefault(writer, {})

    @cached_property
    def _continues(self) -> bool:
        """Whether the directory has another file than the writer's."""
        try:
            names = os.listdir(self.directory)
        except OSError:  # no local directory
            return False
        return sum("tfevents" in name for name in names) > 1

    def _put(self, events: Sequence[Event]) -> None:
        file_writer = self._writer._get_file_writer()
        for event in events:
            file_writer.add_event(event, walltime=event.wall_time)
        self._writer.flush()

    def close(self) -> None:
        """Leave the writer open."""


def text(tag: str, content: str) -> Summary.Value:
    """Return Markdown that TensorBoard shows as text."""
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    return Summary.Value(
        tag=tag,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype=DT_STRING, string_val=[content.encode()]),
    )


def _event(step: int, wall_time: float, scalars: Sequence[tuple[str, float]]) -> Event:
    event = Event(step=step, wall_time=wall_time)
    add = event.summary.value.add
    for tag, number in scalars:
        value = add()  # with the fields as arguments it takes twice as long
        value.tag = tag
        value.simple_value = number
    return event


def _restarted(event: Event) -> list[Event]:
    """Return an event between marks that make readers drop the later points of its tags.

    TensorBoard's data server drops them without marks. Its other readers have a mark for a restart,
    SessionLog.START, but it drops all curves in the directory, including those of another clipper
    at another step, and a user's own that count samples or epochs. In files of version 1, these
    readers drop only the tags of an event whose step falls back: so the marks claim version 1 for
    this event.
    """
    time = event.wall_time
    return [
        Event(wall_time=time, file_version="brain.Event:1"),
        Event(wall_time=time, step=event.step + 1, summary=Summary()),
        event,
        Event(wall_time=time, file_version="brain.Event:2"),
    ]


_files: WeakValueDictionary[str, EventFile] = WeakValueDictionary()
_last_steps: WeakKeyDictionary[SummaryWriter, dict[str, int]] = WeakKeyDictionary()


def destination_of(where: object, since: int) -> Destination:
    """Return the destination for a ``where``; sinks on one directory share it while it is open.

    Args:
        where: A directory or a ``SummaryWriter``.
        since: See `EventFile`.

    Raises:
        ArgumentError: It is no local directory and no ``SummaryWriter`` of torch.
    """
    if hasattr(where, "add_scalar"):
        return _writer_file(where)
    if not isinstance(where, str | os.PathLike):
        raise ArgumentError(
            f"where is a {type(where).__name__}: give a directory or a SummaryWriter."
        )
    directory = os.fspath(where)
    if not isinstance(directory, str) or not directory or "://" in directory or "\0" in directory:
        raise ArgumentError(
            f"where is {directory!r}: give a local directory, or a SummaryWriter made for it."
        )
    path = os.path.realpath(directory)
    return _files.setdefault(path, EventFile(path, since))


def _writer_file(writer: object) -> WriterFile:
    from torch.utils.tensorboard import SummaryWriter

    if not isinstance(writer, SummaryWriter):
        kind = f"{type(writer).__module__}.{type(writer).__qualname__}"
        raise ArgumentError(
            f"where is a {kind}: give a torch.utils.tensorboard.SummaryWriter, or the directory."
        )
    return WriterFile(writer)
