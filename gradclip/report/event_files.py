"""Runs read from event files of TensorBoard, as a stream of events."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from ..records.sinks.tfrecord import checksums_of, header_of
from .run import Run, warn_unreadable
from .tags import SAID, SETTINGS, TaggedRuns

RECORDS_AT_ONCE = 512
"""Records whose checksums are computed together, in a tenth of the time."""
CUT_SHORT = "it is cut short or damaged, and was read up to that point"
FOREIGN = "it holds records that are not events of TensorBoard"


def read_event_files(directory: Path, files: Sequence[Path]) -> list[Run]:
    """Return the runs in a directory, one for each clipper that wrote there.

    Args:
        directory: The directory, which names the runs.
        files: Its event files.

    Warns:
        UserWarning: A file ends early.
    """
    runs = TaggedRuns(str(directory))
    for path in sorted(files):
        stream = EventStream(path)
        for event in stream:
            add_event(runs, event)
        if stream.trouble is not None or stream.offset < stream.size:
            warn_unreadable(path, stream.trouble or CUT_SHORT)
    if runs.trouble is not None:
        warn_unreadable(directory, runs.trouble)
    return runs.runs()


def add_event(runs: TaggedRuns, event: Event) -> None:
    """Add the numbers of an event to runs, and what clippers said of its step."""
    numbers, sentences = {}, {}
    for value in event.summary.value:
        if (number := _number(value)) is not None:
            numbers[value.tag] = number
        elif value.tag.endswith(SAID) and value.tensor.string_val:
            sentences[value.tag] = _text(value)
        elif value.tag.endswith(SETTINGS) and value.tensor.string_val:
            runs.configure(value.tag, _text(value))
    runs.add(event.step, numbers)
    if sentences:
        runs.say(event.step, sentences)


def _text(value: Summary.Value) -> str:
    text: str = value.tensor.string_val[0].decode(errors="replace")
    return text


def _number(value: Summary.Value) -> float | None:
    """Return the number of a value, which some writers keep as a tensor; None if it is none."""
    number: float = value.simple_value
    if number:  # the usual case, in half the time; 0 may also stand for another kind of value
        return number
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return number
    if kind == "tensor":
        numbers = value.tensor.float_val or value.tensor.double_val
        return float(numbers[0]) if numbers else None
    return None


class EventStream:
    """The events of a file that may grow: each iteration goes on where the last one ended.

    It ends before an event that is not whole yet, and for good at a damaged one.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Number of bytes of the events so far."""
        self.size = 0
        """Size of the file when the last iteration began."""
        self._identity: tuple[int, int] | None = None
        self.trouble: str | None = None
        """The reason why the rest of the file cannot be read; None if there is none."""

    def __iter__(self) -> Iterator[Event]:
        """Yield the events that are new.

        Raises:
            OSError: The file cannot be read.
        """
        with self.path.open("rb") as file:
            facts = os.fstat(file.fileno())
            self.size, self._identity = facts.st_size, _identity_of(facts)
            file.seek(self.offset)
            while self.trouble is None and (records := self._whole_records(file)):
                found = checksums_of([content for content, _ in records])
                for (content, checksum), needed in zip(records, found, strict=True):
                    if checksum != needed:
                        self.trouble = CUT_SHORT
                        return
                    try:
                        event = Event.FromString(content)
                    except DecodeError:
                        self.trouble = FOREIGN
                        return
                    self.offset += len(content) + 16
                    yield event

    def was_replaced(self) -> bool:
        """Return whether the file that was read is gone, is another one or has become shorter."""
        try:
            facts = self.path.stat()
        except FileNotFoundError:
            return True
        is_other = self._identity not in (None, _identity_of(facts))
        return is_other or facts.st_size < self.offset

    def _whole_records(self, file: BinaryIO) -> list[tuple[bytes, bytes]]:
        """Return the contents and checksums of the next records that the file has in full."""
        records: list[tuple[bytes, bytes]] = []
        end = self.offset
        while len(records) < RECORDS_AT_ONCE and end + 12 <= self.size:
            header = file.read(12)
            [length] = struct.unpack_from("<Q", header)
            if header != header_of(length):
                # Reported once the records before it are read.
                self.trouble = None if records else CUT_SHORT
                break
            end += length + 16
            # Damaged bytes may claim any length: never read more than the file holds.
            if end > self.size:
                break
            records.append((file.read(length), file.read(4)))
        file.seek(self.offset + sum(len(content) + 16 for content, _ in records))
        return records


def _identity_of(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino
