"""Counts the steps and carries their records to the sinks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from .records import ClipRecord, Counters, RecordBuffer, Sink

UNLOGGED_CAPACITY = 1000
"""Records kept before they are counted where no sink asks for a shorter batch."""


class Recorder:
    """What a clipper hands its records to; it outlives the clipper until all is written.

    Args:
        sinks: Where the steps go; may be empty.
        order: p of the norm, for the total over several norms.
    """

    def __init__(self, sinks: Sequence[Sink], order: float) -> None:
        self.sinks = list(sinks)
        self._counters = Counters()
        capacity = min((sink.flush_every for sink in sinks), default=UNLOGGED_CAPACITY)
        self._buffer = RecordBuffer(capacity, order)
        self._failed: set[int] = set()
        self._closed = False

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
        """Take over the record of a step. No host sync, and a full batch goes to the sinks."""
        self._buffer.append(record)
        if self._buffer.sent:
            self._deliver(wait=False)

    def flush(self) -> None:
        """Write everything up to now; waits for the device."""
        self._deliver(wait=True)
        self._each_sink(lambda sink: sink.flush())

    def close(self) -> None:
        """Write everything and release the sinks; the second call does nothing."""
        if not self._closed:
            self.flush()
            self._each_sink(lambda sink: sink.close())
            self._closed = True

    def _deliver(self, *, wait: bool) -> None:
        rows = self._buffer.take(self._counters, wait=wait)
        if rows and not self._closed:
            self._each_sink(lambda sink: sink.write(rows))

    def _each_sink(self, call: Callable[[Sink], None]) -> None:
        for index, sink in enumerate(self.sinks):
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001  # logging never stops training
                if index not in self._failed:
                    self._failed.add(index)
                    warnings.warn(
                        f"{type(sink).__name__} failed and may miss steps: {error!r}. Training "
                        "goes on; this is said once. Check that its destination can be written.",
                        RuntimeWarning,
                        stacklevel=2,
                    )
