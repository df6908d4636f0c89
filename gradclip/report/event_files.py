"""Runs read from event files of TensorBoard, as a stream of events."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from ..records.sinks.tfrecord import checksum_of, header_of
from .run import Run, warn_unreadable
from .tags import TaggedRuns


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
            runs.add(event.step, {value.tag: _number(value) for value in event.summary.value})
    return runs.runs()


def _number(value: Summary.Value) -> float:
    """Return the number of a value, which some writers keep as a tensor."""
    tensor = value.tensor
    numbers = [*tensor.float_val, *tensor.double_val] if value.HasField("tensor") else []
    return float(numbers[0] if numbers else value.simple_value)


def _events(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to its end, or up to the first damaged one."""
    with path.open("rb") as file:
        while header := file.read(12):
            [length] = struct.unpack_from("<Q", header.ljust(8))
            # Damaged bytes may claim any length: never read more than the file holds.
            plausible = length <= os.fstat(file.fileno()).st_size and header == header_of(length)
            content = file.read(length) if plausible else b""
            if not content or file.read(4) != checksum_of(content):
                warn_unreadable(path, "it is cut short or damaged, and was read up to that point")
                return
            try:
                yield Event.FromString(content)
            except DecodeError:
                warn_unreadable(path, "it holds records that are not events of TensorBoard")
                return
