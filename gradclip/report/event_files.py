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
from .tags import TaggedRuns

RECORDS_AT_ONCE = 512


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
        for event in _events(path):
            numbers = {}
            for value in event.summary.value:
                if (number := _number(value)) is not None:
                    numbers[value.tag] = number
            runs.add(event.step, numbers)
    return runs.runs()


def _number(value: Summary.Value) -> float | None:
    """Return the number of a value, which some writers keep as a tensor; None if it is none."""
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind == "tensor":
        numbers = value.tensor.float_val or value.tensor.double_val
        return float(numbers[0]) if numbers else None
    return None


def _events(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to its end, or up to the first damaged one."""
    with path.open("rb") as file:
        for content in _contents(file):
            if content is None:
                warn_unreadable(path, "it is cut short or damaged, and was read up to that point")
                return
            try:
                yield Event.FromString(content)
            except DecodeError:
                warn_unreadable(path, "it holds records that are not events of TensorBoard")
                return


def _contents(file: BinaryIO) -> Iterator[bytes | None]:
    """Yield the contents of the records of a file, and None in place of a damaged one and its rest.

    Checksums of many records at once take a tenth of the time.
    """
    size = os.fstat(file.fileno()).st_size
    is_whole = True
    while is_whole:
        contents: list[bytes] = []
        checksums: list[bytes] = []
        while is_whole and len(contents) < RECORDS_AT_ONCE and (header := file.read(12)):
            [length] = struct.unpack_from("<Q", header.ljust(8))
            # Damaged bytes may claim any length: never read more than the file holds.
            is_whole = length <= size and header == header_of(length)
            if is_whole:
                contents.append(file.read(length))
                checksums.append(file.read(4))
        for content, checksum, found in zip(
            contents, checksums, checksums_of(contents), strict=True
        ):
            if checksum != found:
                yield None
                return
            yield content
        if not contents and is_whole:
            return
    yield None
