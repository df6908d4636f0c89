"""Short runs that are logged, and their logs, read back as their readers do."""

import io
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from gradclip import GradientClipper, LoggedStep, Sink
from gradclip.report import Run, read_runs

from .clippers import Training

NAMES = ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
TAGS = {f"grad_norm/{name}" for name in NAMES}
SECOND_TAGS = {f"grad_norm_2/{name}" for name in NAMES}


def log_run(
    log: Any, *norms: float, max_norm: Any = 2.0, first: int = 0, **options: Any
) -> GradientClipper:
    """Take a step with each norm, from an index on; the returned clipper is closed."""
    run = Training()
    with GradientClipper(run.optimizer, max_norm, log=log, **options) as clipper:
        clipper.steps = first
        run.take(*norms)
    return clipper


def log_losses(
    log: Any, *losses: float | None, norms: Sequence[float] | None = None, **options: Any
) -> None:
    """Take a step with each loss, None for none, and with norms of 1 or the given ones."""
    run = Training()
    with GradientClipper(run.optimizer, **{"max_norm": 2.0, "log": log, **options}) as clipper:
        for index, loss in enumerate(losses):
            clipper.loss = loss
            run.take(norms[index] if norms else 1.0)


def log_named(log: Any, names: str, *steps: Sequence[float | None], **options: Any) -> None:
    """Take steps at which named parameters have gradients with these norms, or None."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
    optimizer = torch.optim.SGD([*zip(names, parameters, strict=True)], lr=0.0)
    with GradientClipper(optimizer, **{"max_norm": 1.0, "log": log, **options}):
        for norms in steps:
            for parameter, norm in zip(parameters, norms, strict=True):
                parameter.grad = None if norm is None else torch.full((1,), norm)
            optimizer.step()


class Kept(Sink):
    """Keeps the steps that it gets and the methods that are called; some of them act first."""

    def __init__(
        self,
        act: Any = int,
        *methods: str,
        flush_every: int = 100,
        per_parameter: int = 0,
        weights_every: int = 0,
    ) -> None:
        self.act, self.methods = act, methods or ("write",)
        self.flush_every, self.per_parameter = flush_every, per_parameter
        self.weights_every = weights_every
        self.settings: Mapping[str, str] = {}
        self.calls: list[str] = []
        self.batches: list[list[int]] = []
        self.steps: list[LoggedStep] = []

    def begin(self, settings: Mapping[str, str]) -> None:
        self._call("begin")
        self.settings = {**settings}

    def write(self, steps: Sequence[LoggedStep]) -> None:
        self._call("write")
        self.steps += steps
        self.batches.append([step.step for step in steps])

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if method in self.methods:
            self.act()


def indices_in(sink: Any) -> list[int]:
    """Return the indices of the steps that a sink keeps."""
    return [step.step for step in sink.steps]


def runs_in(path: os.PathLike[str]) -> list[Run]:
    """Return the runs at a path, as ``gradclip report`` reads them."""
    return read_runs([os.fspath(path)])


def curves_in(directory: os.PathLike[str]) -> dict[str, list[Any]]:
    """Return every point of every scalar in a directory, as TensorBoard reads it."""
    reader = EventAccumulator(os.fspath(directory), size_guidance={"scalars": 0}).Reload()
    return {tag: reader.Scalars(tag) for tag in reader.Tags()["scalars"]}


def values_in(directory: os.PathLike[str]) -> dict[str, list[float]]:
    """Return the values of every scalar in a directory."""
    return {tag: [p.value for p in points] for tag, points in curves_in(directory).items()}


def steps_in(directory: os.PathLike[str]) -> dict[str, list[int]]:
    """Return the steps of every scalar in a directory."""
    return {tag: [p.step for p in points] for tag, points in curves_in(directory).items()}


def texts_in(directory: os.PathLike[str], tag: str) -> dict[int, str]:
    """Return the texts under a tag by step."""
    reader = EventAccumulator(os.fspath(directory), size_guidance={"tensors": 0}).Reload()
    return {p.step: p.tensor_proto.string_val[0].decode() for p in reader.Tensors(tag)}


def lines_in(path: os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a `JsonlSink`, each of which has to be whole and strict JSON."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def header_of(length: int) -> bytes:
    """Return the header of a record of an event file, its checksum included."""
    header = struct.pack("<Q", length)
    return header + struct.pack("<I", masked_crc32c(header))


def framed(contents: Sequence[bytes]) -> bytes:
    """Return contents as the records of an event file, as TensorBoard's own writer does."""
    stream = io.BytesIO()
    for content in contents:
        RecordWriter(stream).write(content)
    return stream.getvalue()
