"""Carries the record of each step from the clipper to the counters and the sinks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.util import Finalize
from weakref import WeakMethod, WeakSet

import torch
from torch import Tensor

from ..checks import checked_count
from ..engines.base import has_values
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import AttachError
from .buffer import RecordBuffer
from .counting import Counters, StepCounter
from .incidents import skip_limit_error
from .logged_step import LoggedStep
from .norm_history import NormHistory
from .record import ClipRecord
from .replays import ReplayedRecords, may_be_captured
from .sinks.base import CadencedSink, Sink
from .weight_sums import is_due

SECONDS = 10.0
"""So often a batch is complete at least, if a step ends then: little is lost after slow steps."""
UNLOGGED_CAPACITY = 1000
"""Records kept before they are counted if no sink asks for a shorter batch."""


class Recorder:
    """Takes the records of a clipper; lives on after the clipper until everything is written.

    Args:
        sinks: Destinations of the steps; may be empty.
        order: p of the norm, for the total over several norms.
        skip_limit: So many skipped steps in a row raise; None for no limit.
        observed: True if clipping is only observed.

    Raises:
        ArgumentError: The ``flush_every`` of a sink is not a whole number >= 1, or its
            ``weights_every`` not one >= 0.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        order: float,
        skip_limit: int | None = None,
        *,
        observed: bool = False,
    ) -> None:
        self.sinks = tuple(sinks)
        """The sinks, also after they were closed."""
        self._sinks = list(sinks)
        self.weights_every = frozenset(filter(None, map(_weights_every, self._sinks)))
        """The numbers of steps after which sinks ask for the norms of the parameters."""
        self._counter = StepCounter(order, observed=observed)
        self._buffer = RecordBuffer(min(map(_flush_every, sinks), default=UNLOGGED_CAPACITY))
        self._replayed: ReplayedRecords | None = None
        self._skip_limit = skip_limit
        self._warned: set[int] = set()
        self._due = time.monotonic() + SECONDS
        self._device_overflows = False
        """Whether GradScaler may have skipped steps of which only the device knows."""
        self.seen = 0
        """Steps that the host knows of, including those that GradScaler skipped."""

    def begin(self, settings: Mapping[str, str]) -> None:
        """Give the sinks the settings of the clipper, which is attached now.

        Earlier clippers with the same destinations write what they have: later it would stand
        among the steps of this one.
        """
        places = self._places()
        for other in [*_open]:
            if other is not self and places & other._places():
                other.flush()
        _open.add(self)
        count_steps = WeakMethod(self._count_steps)  # a sink may outlive its recorder
        for sink in self._sinks:
            if isinstance(sink, CadencedSink):
                sink.follow(lambda: count() if (count := count_steps()) else 0)
        self._call_sinks(lambda sink: sink.begin(settings))

    def watch(self, names: Mapping[str, int]) -> None:
        """Report when clipping leaves one of these parameters a gradient of nearly 0.

        Args:
            names: The names of the parameters, with the index of their norm.
        """
        self._counter.watched = {**names}

    def _places(self) -> set[str]:
        """Return the files and directories that other sinks may write to as well."""
        return {sink.place for sink in self._sinks if isinstance(sink, CadencedSink) and sink.place}

    def _count_steps(self) -> int:
        """Return the number of steps taken, also in replayed graphs. Waits for the device then."""
        self._read_replays()
        return self.seen

    # Counts, which a user reads

    def history(self) -> NormHistory:
        """Return the norms up to now; waits for the device."""
        self._deliver(wait=True)
        return self._counter.history

    @property
    def steps(self) -> int:
        """How many steps there were; waits for the device if only the device knows."""
        self._read_replays()
        return self.seen - self.overflowed

    @steps.setter
    def steps(self, steps: int) -> None:
        self._deliver(wait=True)
        self.seen = steps + self.overflowed
        self._counter.forget()

    @property
    def counters(self) -> Counters:
        """The counts, up to date; waits for the device."""
        self._deliver(wait=True)
        return self._counter.counters

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self._deliver(wait=True)
        self._counter.counters = counters

    @property
    def overflowed(self) -> int:
        """How many records belong to steps that GradScaler skipped.

        Waits for the device if only the device knows.
        """
        if self._device_overflows:
            self._deliver(wait=True)
        return self._counter.overflowed

    def check_skips(self) -> None:
        """Raise if too many steps in a row were skipped, of which the host has just learned.

        Raises:
            SkipLimitError: ``skip_limit`` steps in a row were skipped.
        """
        limit = self._skip_limit
        if limit is not None and self._counter.pop_longest_run() >= limit:
            raise skip_limit_error(limit, self.seen - 1)

    # The way of a record

    def next_step(self, norms: Tensor | float, *, captured: bool) -> int:
        """Return the index of the step that begins.

        Waits for the device if steps of a CUDA graph were replayed.

        Args:
            norms: Norms of the step, shape (k,), or the one norm as a number.
            captured: Whether the step is captured in a CUDA graph.

        Raises:
            AttachError: The step is captured in a CUDA graph and has no memory for its records.
        """
        if not captured:
            if self._replayed is not None:
                self._read_replays()
        elif isinstance(norms, float) or not self._has_replay_memory(norms.numel(), norms.device):
            raise AttachError(
                "A step was captured in a CUDA graph before any step was taken, so its records "
                "have no memory: take a few steps on a side stream first, as torch.cuda.graph "
                "asks for."
            )
        return self.seen

    def add(self, record: ClipRecord) -> None:
        """Take the record of a step; a batch that has arrived goes to the sinks.

        No host sync on CUDA. A record of meta or fake tensors is only counted.
        """
        if not (record.is_number or has_values(record.values[0])):
            self.seen += 1
            return
        if self._replayed is not None and capturing():
            keep_if_captured(self._replayed)
            self._replayed.write(record)
            return
        captured = not record.is_number and may_be_captured(record)
        if captured and not self._has_replay_memory(record.count, record.device):
            # Before any capture: memory that is made within one belongs to the graph.
            self._replayed = ReplayedRecords(record.norms)
        self.seen += 1
        self._device_overflows |= record.overflow is not None
        arriving = self._buffer.append(record)
        if self._sinks and (now := time.monotonic()) >= self._due:
            # After a slow step: a crash during the next one is to lose little.
            self._due = now + SECONDS
            arriving = self._buffer.send()
        if arriving:
            self._deliver(wait=False)

    def flush(self) -> None:
        """Write everything up to now; waits for the device."""
        self._deliver(wait=True)
        self._call_sinks(lambda sink: sink.flush())

    def close_after(self, owner: object) -> None:
        """Close once the owner is collected or this process ends; not in its forked children."""
        # Finalizers of weakref do not run at the end of a process that was forked to train.
        Finalize(owner, self.close, exitpriority=0)

    def close(self) -> None:
        """Write everything and release the sinks; the second call does nothing."""
        # The garbage collector may call this while a dispatch mode takes every operation of this
        # thread: torch.compile, for example, works on tensors without values.
        if torch._C._len_torch_dispatch_stack():
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(self._close).result()
        else:
            self._close()

    def _close(self) -> None:
        try:
            self.flush()
        finally:
            self._call_sinks(lambda sink: sink.close())
            self._sinks = []
            _open.discard(self)

    def _read_replays(self) -> None:
        if self._replayed is not None:
            replayed, records = self._replayed.take(self.seen)
            self.seen += replayed
            for record in records:
                self._device_overflows |= record.overflow is not None
                self._buffer.append(record)

    def _has_replay_memory(self, count: int, device: torch.device) -> bool:
        return self._replayed is not None and self._replayed.fits(count, device)

    def _deliver(self, *, wait: bool) -> None:
        """Count the batches that have arrived, with ``wait`` all of them, and log their rows."""
        if wait:
            self._read_replays()
        rows: list[LoggedStep] = []
        asked = any(sink.per_parameter for sink in self._sinks)
        for batch in self._buffer.take(wait=wait):
            if self._sinks:
                rows += self._counter.rows(batch, parameter_norms=asked)
            else:
                self._counter.count(batch)
        if rows:
            self._call_sinks(lambda sink: sink.write(_rows_for(sink, rows)))

    # The sinks, whose failures never stop a training

    def _call_sinks(self, call: Callable[[Sink], None]) -> None:
        failures = []
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:  # noqa: BLE001  # logging never stops training
                failures.append((sink, error))
        for failure in failures:  # after all sinks: a filter may turn warnings into errors
            self._warn_once(*failure)

    def _warn_once(self, sink: Sink, error: Exception) -> None:
        if id(sink) in self._warned:
            return
        self._warned.add(id(sink))
        warnings.warn(
            f"{type(sink).__name__} failed and may miss steps: {type(error).__name__}: {error}. "
            "Training goes on, and its later failures are not reported. Check that its "
            "destination is writable.",
            RuntimeWarning,
            stacklevel=3,
        )


_open: WeakSet[Recorder] = WeakSet()
"""The recorders of attached clippers that are not closed."""


def _flush_every(sink: Sink) -> int:
    return checked_count(f"{type(sink).__name__}.flush_every", sink.flush_every, 1)


def _weights_every(sink: Sink) -> int:
    return checked_count(f"{type(sink).__name__}.weights_every", sink.weights_every, 0)


def _rows_for(sink: Sink, rows: Sequence[LoggedStep]) -> tuple[LoggedStep, ...]:
    """Return the rows, without the norms of parameters and weights that other sinks ask for.

    A tuple: no sink can change what the next one gets.
    """
    if not sink.per_parameter:
        rows = [row._replace(parameter_norms=None) if row.parameter_norms else row for row in rows]
    return tuple(
        row
        if row.weight_norms is None or is_due(row.weight_norms, sink.weights_every)
        else row._replace(weight_norms=None, update_ratios=None)
        for row in rows
    )
