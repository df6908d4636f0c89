"""Counts the steps and carries them to the sinks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .buffer import Batch, RecordBuffer
from .checks import checked_count
from .records import ClipRecord, Counters, LoggedStep, Sink, clipped

UNLOGGED_CAPACITY = 1000
"""Records kept before they are counted where no sink asks for a shorter batch."""


class Recorder:
    """What a clipper hands its records to; it outlives the clipper until all is written.

    Args:
        sinks: Where the steps go; may be empty.
        order: p of the norm, for the total over several norms.

    Raises:
        ArgumentError: The ``flush_every`` of a sink is no whole number >= 1.
    """

    def __init__(self, sinks: Sequence[Sink], order: float) -> None:
        self._sinks = list(sinks)
        self._order = order
        self._counters = Counters()
        self._buffer = RecordBuffer(min(map(_flush_every, sinks), default=UNLOGGED_CAPACITY))
        self._reported: set[int] = set()

    @property
    def counters(self) -> Counters:
        """The counts, up to date; waits for the device."""
        self._deliver(wait=True)
        return self._counters

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self._deliver(wait=True)
        self._counters = counters

    def add(self, record: ClipRecord) -> None:
        """Take over the record of a step; a batch that has arrived goes to the sinks.

        No host sync on CUDA.
        """
        self._buffer.append(record)
        self._deliver(wait=False)

    def flush(self) -> None:
        """Write everything up to now; waits for the device."""
        self._deliver(wait=True)
        self._each_sink(lambda sink: sink.flush())

    def close(self) -> None:
        """Write everything and release the sinks; the second call does nothing."""
        try:
            self.flush()
        finally:
            self._each_sink(lambda sink: sink.close())
            self._sinks = []

    def _deliver(self, *, wait: bool) -> None:
        rows: list[LoggedStep] = []
        for batch in self._buffer.take(wait=wait):
            rows += self._rows(batch)
        if rows:
            self._each_sink(lambda sink: sink.write(tuple(rows)))

    def _rows(self, batch: Batch) -> list[LoggedStep]:
        """Count a batch, and return it as plain numbers where a sink wants them."""
        norms, thresholds, coefficients = batch.values()
        finite = norms.isfinite()
        nonfinite = ~finite.all(1)
        skipped = torch.tensor([record.skipped for record in batch.records], device="cpu")
        each = (((coefficients < 1) & finite).sum(1), finite.sum(1), nonfinite, skipped)
        counts = torch.stack(each).cumsum(1) + _column(self._counters)
        self._counters = Counters(*counts[:, -1].tolist())
        if not self._sinks:
            return []
        columns = (  # in the order of the fields
            [record.step for record in batch.records],
            [record.wall_time for record in batch.records],
            self._totals(norms).tolist(),
            self._totals(clipped(norms, coefficients)).tolist(),
            _only_limits(thresholds),
            coefficients.amin(1).tolist(),
            nonfinite.tolist(),
            skipped.tolist(),
            (counts[0].double() / counts[1].clamp(min=1)).tolist(),
            counts[2].tolist(),
            counts[3].tolist(),
        )
        return [LoggedStep(*row) for row in zip(*columns, strict=True)]

    def _totals(self, norms: Tensor) -> Tensor:
        only = norms.shape[1] == 1
        return norms[:, 0] if only else torch.linalg.vector_norm(norms, self._order, 1)

    def _each_sink(self, call: Callable[[Sink], None]) -> None:
        failures = []
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001  # logging never stops training
                failures.append((sink, error))
        for failure in failures:  # after all sinks: a filter may turn warnings into errors
            self._report(*failure)

    def _report(self, sink: Sink, error: Exception) -> None:
        if id(sink) not in self._reported:
            self._reported.add(id(sink))
            warnings.warn(
                f"{type(sink).__name__} failed and may miss steps: {type(error).__name__}: {error}."
                " Training goes on, and its later failures are not reported. Check that its "
                "destination is writable.",
                RuntimeWarning,
                stacklevel=3,
            )


def _flush_every(sink: Sink) -> int:
    return checked_count(f"{type(sink).__name__}.flush_every", sink.flush_every, 1)


def _column(counters: Counters) -> Tensor:
    counts = (counters.clipped, counters.finite, counters.nonfinite_steps, counters.skipped_steps)
    return torch.tensor(counts, device="cpu")[:, None]


def _only_limits(thresholds: Tensor) -> list[float | None]:
    """Return the threshold of each step, None where there is none or more than one."""
    if thresholds.shape[1] > 1:
        return [None] * len(thresholds)
    return [limit if limit < math.inf else None for limit in thresholds[:, 0].tolist()]
