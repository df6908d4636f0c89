"""Reading of what `gradclip.TensorBoardSink` wrote, one event after the other."""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from ..records.sinks.tfrecord import checksum_of, header_of
from .run import Columns, Run, warn_of

_TAG = re.compile(
    r"grad_norm(?P<of>_\d+)?/(?P<number>pre|post|threshold|skipped_steps)"
    r"|parameter_norm(?P<own>_\d+)?/(?P<parameter>.+)",
    re.DOTALL,
)


def read_event_files(directory: Path, files: Sequence[Path]) -> list[Run]:
    """Return the runs in a directory, one for each clipper that wrote there.

    Args:
        directory: Gives the runs their name.
        files: Its event files.

    Warns:
        UserWarning: A file ends early.
    """
    runs: dict[str, Columns] = {}
    skipped: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(files):
        for event in _events(path):
            numbers, parameters = _numbers(event)
            for clipper, named in numbers.items():
                if "pre" not in named:
                    continue
                count = named.get("skipped_steps", 0.0)
                counts = skipped.setdefault(clipper, [(-1, 0.0)])
                while counts[-1][0] >= event.step >= 0:  # a run that was resumed replaces them
                    counts.pop()
                left_out = float(count > counts[-1][1])
                counts.append((event.step, count))
                if clipper not in runs:
                    which = f" (grad_norm{clipper})" if clipper else ""
                    runs[clipper] = Columns(f"{directory}{which}")
                clipped, threshold = named.get("post", math.nan), named.get("threshold", math.nan)
                row = (event.step, named["pre"], clipped, threshold, left_out)
                runs[clipper].add_step(row, parameters.get(clipper))
    return [columns.run() for _, columns in sorted(runs.items())]


_Named: TypeAlias = dict[str, dict[str, float]]
"""Numbers by what ends the prefix of their clipper, and by name."""


def _numbers(event: Event) -> tuple[_Named, _Named]:
    """Return the numbers of an event, and its norms of parameters."""
    numbers: _Named = {}
    parameters: _Named = {}
    for value in event.summary.value:
        meaning = _meaning(value.tag)
        if meaning is not None:
            clipper, name, is_parameter = meaning
            found = parameters if is_parameter else numbers
            found.setdefault(clipper, {})[name] = value.simple_value
    return numbers, parameters


@lru_cache(maxsize=1 << 16)  # the same tags come in every step
def _meaning(tag: str) -> tuple[str, str, bool] | None:
    """Return what ends the prefix, the name, and if it is of a parameter; None if not ours."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    if match["parameter"] is not None:
        return match["own"] or "", match["parameter"], True
    return match["of"] or "", match["number"], False


def _events(path: Path) -> Iterator[Event]:
    """Yield the events of a file up to its end, or to where it is damaged."""
    with path.open("rb") as file:
        while header := file.read(12):
            [length] = struct.unpack_from("<Q", header.ljust(8))
            # No more than there is: any number may stand there.
            whole = length <= os.fstat(file.fileno()).st_size and header == header_of(length)
            content = file.read(length) if whole else b""
            if not content or file.read(4) != checksum_of(content):
                warn_of(path, "it is cut short or damaged, and read up to there")
                return
            try:
                yield Event.FromString(content)
            except DecodeError:
                warn_of(path, "it holds records that are no events of TensorBoard")
                return
