"""Runs read from event files of `gradclip.TensorBoardSink`, as a stream of events."""

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
from .run import Run, RunBuilder, as_logged_loss, warn_unreadable

_TAG = re.compile(
    r"grad_norm(?P<clipper>_\d+)?/(?P<quantity>pre|post|threshold|skipped_steps|loss)"
    r"|parameter_norm(?P<its_clipper>_\d+)?/(?P<parameter>.+)",
    re.DOTALL,
)


def read_event_files(directory: Path, files: Sequence[Path]) -> list[Run]:
    """Return the runs in a directory, one for each clipper that wrote there.

    Args:
        directory: The directory, which names the runs.
        files: Its event files.

    Warns:
        UserWarning: A file ends early.
    """
    builders: dict[str, RunBuilder] = {}
    skip_totals: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(files):
        for event in _events(path):
            quantities, parameter_norms = _numbers(event)
            for clipper, numbers in quantities.items():
                if "pre" not in numbers:
                    continue
                totals = skip_totals.setdefault(clipper, [(-1, 0.0)])
                skipped = _is_skipped(event.step, numbers.get("skipped_steps", 0.0), totals)
                if clipper not in builders:
                    suffix = f" (grad_norm{clipper})" if clipper else ""
                    builders[clipper] = RunBuilder(f"{directory}{suffix}")
                post, threshold = numbers.get("post", math.nan), numbers.get("threshold", math.nan)
                loss = as_logged_loss(numbers["loss"]) if "loss" in numbers else math.nan
                row = (event.step, numbers["pre"], post, threshold, skipped, loss)
                builders[clipper].add_step(row, parameter_norms.get(clipper))
    return [builder.run() for _, builder in sorted(builders.items())]


def _is_skipped(step: int, total: float, totals: list[tuple[int, float]]) -> bool:
    """Return whether the number of skipped steps rose at a step, and append it to the earlier ones.

    Event files hold only the running total. A resumed run logs some steps again, so the totals of
    steps that it replaces are dropped first.
    """
    while totals[-1][0] >= step >= 0:  # a negative step of a damaged file drops nothing
        totals.pop()
    rose = total > totals[-1][1]
    totals.append((step, total))
    return rose


_ByClipper: TypeAlias = dict[str, dict[str, float]]
"""Numbers by the suffix of their clipper ("" for the first, "_2" for the second), and by name."""


def _numbers(event: Event) -> tuple[_ByClipper, _ByClipper]:
    """Return the quantities of the steps in an event, and the norms of its parameters."""
    quantities: _ByClipper = {}
    parameter_norms: _ByClipper = {}
    for value in event.summary.value:
        tag = _parsed(value.tag)
        if tag is not None:
            clipper, name, is_parameter = tag
            numbers = parameter_norms if is_parameter else quantities
            numbers.setdefault(clipper, {})[name] = value.simple_value
    return quantities, parameter_norms


@lru_cache(maxsize=1 << 16)  # the same tags return at every step
def _parsed(tag: str) -> tuple[str, str, bool] | None:
    """Return a tag's clipper, its name, and True for a parameter; None for a foreign tag."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    if match["parameter"] is not None:
        return match["its_clipper"] or "", match["parameter"], True
    return match["clipper"] or "", match["quantity"], False


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
