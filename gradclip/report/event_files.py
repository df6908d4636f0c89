"""Reading of what `gradclip.TensorBoardSink` wrote, one event after the other."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from ..sinks.record_format import checksum_of, header_of
from .run import Columns, Run
from .trouble import warn_of

_TAG = re.compile(r"(grad_norm(?:_\d+)?)/(pre|post|threshold|skipped_steps)")


def read_event_files(directory: Path, files: Sequence[Path]) -> list[Run]:
    """Return the runs in a directory, one for each clipper that wrote there.

    Args:
        directory: Gives the runs their name.
        files: Its event files.

    Warns:
        UserWarning: A file ends early.
    """
    runs: dict[str, Columns] = {}
    skipped: dict[str, float] = {}
    for path in sorted(files):
        for event in _events(path):
            for prefix, numbers in _numbers(event).items():
                count = numbers.get("skipped_steps", 0.0)
                left_out = float(count > skipped.get(prefix, 0.0))
                skipped[prefix] = count
                norm, clipped = numbers["pre"], numbers.get("post", math.nan)
                threshold = numbers.get("threshold", math.nan)
                if prefix not in runs:
                    clipper = "" if prefix == "grad_norm" else f" ({prefix})"
                    runs[prefix] = Columns(f"{directory}{clipper}")
                runs[prefix].add_step(event.step, norm, clipped, threshold, left_out)
    return [columns.run() for _, columns in sorted(runs.items())]


def _numbers(event: Event) -> dict[str, dict[str, float]]:
    """Return the numbers of an event by prefix and name, of clippers alone."""
    found: dict[str, dict[str, float]] = {}
    for value in event.summary.value:
        match = _TAG.fullmatch(value.tag)
        if match is not None:
            found.setdefault(match[1], {})[match[2]] = value.simple_value
    return {prefix: numbers for prefix, numbers in found.items() if "pre" in numbers}


def _events(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to its end, or to where it is damaged."""
    with path.open("rb") as file:
        while header := file.read(12):
            [length] = struct.unpack_from("<Q", header.ljust(8))
            content = file.read(length) if header == header_of(length) else b""
            if not content or file.read(4) != checksum_of(content):
                warn_of(path, "it is cut short or damaged, and read up to there")
                return
            try:
                yield Event.FromString(content)
            except DecodeError:
                warn_of(path, "it holds records that are no events of TensorBoard")
                return
