"""Counts the steps and carries them to the sinks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from ..checks import checked_count
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import AttachError
from .buffer import Batch, RecordBuffer
from .incidents import incident_of, skip_limit_error
from .logged_step import LoggedStep
from .norm_history import SHOWN, NormHistory
from .parameter_norms import ParameterNorms
from .record import ClipRecord, Counters, clipped_norms
from .replays import ReplayedRecords, may_be_captured
from .sinks.base import Sink

UNLOGGED_CAPACITY = 1000
"""Records kept before they are counted where no sink asks for a shorter batch."""


class Recorder:
    """What a clipper hands its records to; it outlives the clipper until all is written.

    Args:
        sinks: Where the steps go; may be empty.
        order: p of the norm, for the total over several norms.
        skip_limit: So many skipped steps in a row are too many.

    Raises:
        ArgumentError: The ``flush_every`` of a sink is no whole number >= 1.
    """

    def __init__(self, sinks: Sequence[Sink], order: float, skip_limit: int | None = None) -> None:
        self._sinks = list(sinks)
        self._order = order
        self._counters = Counters()
        self._buffer = RecordBuffer(min(map(_flush_every, sinks), default=UNLOGGED_CAPACITY))
        self._reported: set[int] = set()
        self._flagged = False
        self._overflowed = 0
        self._skip_limit = skip_limit
        self._longest_skip = 0
        self._history = NormHistory()
        self._replayed: ReplayedRecords | None = None
        self.seen = 0
        """Steps that the host knows of, those included that GradScaler left out."""

    def begin(self, settings: Mapping[str, str]) -> None:
        """Tell the sinks how the clipper is set."""
        self._each_sink(lambda sink: sink.begin(settings))

    @property
    def has_sinks(self) -> bool:
        """Whether steps go anywhere."""
        return bool(self._sinks)

    def history(self) -> NormHistory:
        """Return the norms up to now; waits for the device."""
        self._deliver(wait=True)
        return self._history

    @property
    def steps(self) -> int:
        """How many steps there were; waits for the device if only that knows."""
        self._hear_of_replays()
        return self.seen - self.overflowed

    @steps.setter
    def steps(self, steps: int) -> None:
        self._deliver(wait=True)
        self.seen = steps + self.overflowed
        self._history = NormHistory()

    @property
    def counters(self) -> Counters:
        """The counts, up to date; waits for the device."""
        self._deliver(wait=True)
        return self._counters

    @counters.setter
    def counters(self, counters: Counters) -> None:
        self._deliver(wait=True)
        self._counters = counters

    @property
    def overflowed(self) -> int:
        """How many records were of steps that GradScaler left out.

        Waits for the device if only that knows.
        """
        if self._flagged:
            self._deliver(wait=True)
        return self._overflowed

    def check_skips(self) -> None:
        """Refuse to go on after too many skipped steps of which the host has heard only now.

        Raises:
            SkipLimitError: So many were skipped in a row.
        """
        longest, self._longest_skip = self._longest_skip, 0
        if self._skip_limit is not None and longest >= self._skip_limit:
            raise skip_limit_error(self._skip_limit, self.seen - 1)

    def next_step(self, norms: Tensor) -> int:
        """Return the index of the step that begins.

        Waits for the device where steps of a CUDA graph were replayed.

        Args:
            norms: Its norms, shape (k,).

        Raises:
            AttachError: It is captured in a CUDA graph, and there is no memory for its records.
        """
        if not capturing():
            self._hear_of_replays()
        elif not self._fit(norms):
            raise AttachError(
                "A step was captured in a CUDA graph before any was taken, so that there is no "
                "memory for its records: take a few steps on a side stream first, as "
                "torch.cuda.graph asks for."
            )
        return self.seen

    def add(self, record: ClipRecord) -> None:
        """Take over the record of a step; a batch that has arrived goes to the sinks.

        No host sync on CUDA.
        """
        if self._replayed is not None and capturing():
            keep_if_captured(self._replayed)
            self._replayed.write(record)
            return
        if may_be_captured(record) and not self._fit(record.norms):
            self._replayed = ReplayedRecords(record.norms)
        self.seen += 1
        self._append(record)
        if self._buffer.sent:
            self._deliver(wait=False)

    def flush(self) -> None:
        """Write everything up to now; waits for the device."""
        self._deliver(wait=True)
        self._each_sink(lambda sink: sink.flush())

    def close_after(self, owner: object) -> None:
        """Close once the owner is collected or this process ends; its forked children do not."""
        # Unlike finalizers of weakref also at the end of a process that was forked to train.
        Finalize(owner, self.close, exitpriority=0)

    def close(self) -> None:
        """Write everything and release the sinks; the second call does nothing."""
        # The garbage collector may call this while somebody's mode takes every operation of this
        # thread, as where torch.compile works on tensors without values.
        if torch._C._len_torch_dispatch_stack():
            with ThreadPoolExecutor(1) as elsewhere:
                elsewhere.submit(self._close).result()
        else:
            self._close()

    def _close(self) -> None:
        try:
            self.flush()
        finally:
            self._each_sink(lambda sink: sink.close())
            self._sinks = []

    def _hear_of_replays(self) -> None:
        if self._replayed is not None:
            replayed, records = self._replayed.take(self.seen)
            self.seen += replayed
            for record in records:
                self._append(record)

    def _fit(self, norms: Tensor) -> bool:
        return self._replayed is not None and self._replayed.fits(norms)

    def _append(self, record: ClipRecord) -> None:
        self._flagged |= record.overflow is not None
        self._buffer.append(record)

    def _deliver(self, *, wait: bool) -> None:
        if wait:
            self._hear_of_replays()
        rows: list[LoggedStep] = []
        for batch in self._buffer.take(wait=wait):
            rows += self._rows(batch)
        if rows:
            self._each_sink(lambda sink: sink.write(self._as_wanted(rows, sink)))

    @property
    def _asked(self) -> bool:
        """Whether a sink asks for the norms of parameters."""
        return any(sink.per_parameter for sink in self._sinks)

    def _as_wanted(self, rows: Sequence[LoggedStep], sink: Sink) -> tuple[LoggedStep, ...]:
        """Return steps without the norms of parameters, unless the sink asks for them."""
        if sink.per_parameter or not self._asked:
            return tuple(rows)
        return tuple(row._replace(parameter_norms=None) for row in rows)

    def _rows(self, batch: Batch) -> list[LoggedStep]:
        """Count a batch, and return it as plain numbers where a sink wants them."""
        values, skipped, overflowed = batch.values(), batch.skipped(), batch.overflowed()
        steps = self._steps_of(batch, overflowed)
        if overflowed is not None:
            values, skipped = values[:, ~overflowed], skipped[~overflowed]
        if not steps:
            return []
        norms, thresholds, coefficients = values
        finite = norms.isfinite()
        nonfinite = ~finite.all(1)
        each = (((coefficients < 1) & finite).sum(1), finite.sum(1), nonfinite, skipped)
        counts = torch.stack(each).cumsum(1) + _column(self._counters)
        in_a_row = self._run_of_skips(skipped.tolist(), batch.has_device_flags)
        reduced, known, unknown, left_out = counts[:, -1].tolist()
        self._counters = Counters(reduced, known, unknown, left_out, in_a_row)
        totals = self._totals(norms).tolist()
        if not self._sinks:
            for norm in totals[-SHOWN:]:
                self._history.add(norm)
            return []
        parts = batch.parts(self._order)
        if overflowed is not None:
            parts = [*compress(parts, (~overflowed).tolist())]
        columns = (  # in the order of the fields
            [step for step, _ in steps],
            [wall_time for _, wall_time in steps],
            totals,
            self._totals(clipped_norms(norms, coefficients)).tolist(),
            _only_limits(thresholds),
            coefficients.amin(1).tolist(),
            nonfinite.tolist(),
            skipped.tolist(),
            (counts[0].double() / counts[1].clamp(min=1)).tolist(),
            counts[2].tolist(),
            counts[3].tolist(),
            parts if self._asked else [None] * len(steps),
            [self._incident(*step) for step in zip(steps, totals, parts, strict=True)],
        )
        return [LoggedStep(*row) for row in zip(*columns, strict=True)]

    def _incident(
        self, step: tuple[int, float], norm: float, parameters: ParameterNorms | None
    ) -> str | None:
        found = incident_of(step[0], norm, parameters, self._history)
        self._history.add(norm)
        return found

    def _steps_of(self, batch: Batch, left_out: Tensor | None) -> list[tuple[int, float]]:
        """Return index and wall time of each step that was not left out by GradScaler."""
        flags = [False] * len(batch.records) if left_out is None else left_out.tolist()
        steps = []
        for record, left in zip(batch.records, flags, strict=True):
            if left:
                self._overflowed += 1
            else:
                steps.append((record.step - self._overflowed, record.wall_time))
        return steps

    def _run_of_skips(self, skipped: Sequence[bool], has_device_flags: bool) -> int:
        """Return how many steps in a row are skipped at the end."""
        run = self._counters.skipped_in_a_row
        for skip in skipped:
            run = run + 1 if skip else 0
            self._longest_skip = max(self._longest_skip, run if has_device_flags else 0)
        return run

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
    counts = (
        counters.clipped,
        counters.finite,
        counters.nonfinite_steps,
        counters.skipped_steps,
    )
    return torch.tensor(counts, device="cpu")[:, None]


def _only_limits(thresholds: Tensor) -> list[float | None]:
    """Return the threshold of each step, None where there is none or more than one."""
    if thresholds.shape[1] > 1:
        return [None] * len(thresholds)
    return [limit if limit < math.inf else None for limit in thresholds[:, 0].tolist()]
