"""What a step leaves behind: its record on the device, rows on the host, the protocol of a sink."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What one step's clipping found and did, on the device.

    The fields are vectors with one entry per label. The properties are what a user reads:
    0-d tensors where there is one norm, else of shape (k,) in the order of
    ``GradientClipper.labels``. They are made when they are read; nothing here waits for the
    device.
    """

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    norms: Tensor
    thresholds: Tensor
    coefficients: Tensor
    skipped: bool = False
    """Whether the whole step was left out."""

    @property
    def norm(self) -> Tensor:
        """Norm as measured, before ``max_value`` and before scaling."""
        return _as_scalar(self.norms)

    @property
    def clipped_norm(self) -> Tensor:
        """Norm afterwards, ``norm * coefficient``; 0 where the gradients were erased."""
        return _as_scalar(clipped(self.norms, self.coefficients))

    @property
    def threshold(self) -> Tensor:
        """Largest norm allowed, infinity for no limit."""
        return _as_scalar(self.thresholds)

    @property
    def coefficient(self) -> Tensor:
        """Factor by which the norm was reduced, in [0, 1]."""
        return _as_scalar(self.coefficients)

    @property
    def nonfinite(self) -> Tensor:
        """Whether the norm was NaN or infinite, bool."""
        return ~_as_scalar(self.norms).isfinite()

    def __repr__(self) -> str:
        names = ("step", "norm", "clipped_norm", "threshold", "coefficient", "nonfinite")
        return f"ClipRecord({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def clipped(norms: Tensor, coefficients: Tensor) -> Tensor:
    """Return the norms after scaling: 0 where a coefficient is 0, also for an infinite norm."""
    return torch.where(coefficients == 0, 0.0, norms * coefficients)


def _as_scalar(values: Tensor) -> Tensor:
    return values.squeeze(0) if values.numel() == 1 else values


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One step as a sink gets it: plain numbers, totals over all norms, counts since the start."""

    step: int
    wall_time: float
    norm: float
    """Total norm before clipping; NaN or infinite where the gradients were."""
    clipped_norm: float
    """Total norm afterwards."""
    threshold: float | None
    """The threshold, None where there is none or more than one."""
    coefficient: float
    """The smallest coefficient."""
    nonfinite: bool
    skipped: bool
    clip_rate: float
    """Share of the finite norms so far that exceeded their threshold."""
    nonfinite_steps: int
    skipped_steps: int


@dataclass(slots=True)
class Counters:
    """What has been counted since the start of training."""

    clipped: int = 0
    """Finite norms above their threshold."""
    finite: int = 0
    """Finite norms."""
    nonfinite_steps: int = 0
    skipped_steps: int = 0

    def count(self, finite: int, exceeded: int, *, nonfinite: bool, skipped: bool) -> None:
        """Count one step."""
        self.finite += finite
        self.clipped += exceeded
        self.nonfinite_steps += nonfinite
        self.skipped_steps += skipped

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that exceeded their threshold; 0 before the first."""
        return self.clipped / self.finite if self.finite else 0.0


class Sink(ABC):
    """Where logged steps go; the one thing to derive from for a destination of one's own.

    Called by the clipper with batches, never within the arithmetic of a step. A method that
    raises is reported once as a warning and never stops training.
    """

    flush_every: int = 100
    """Steps per batch: how many a crash may lose."""

    @abstractmethod
    def write(self, steps: Sequence[LoggedStep]) -> None:
        """Take over a batch in the order of the steps, and leave it safe from a crash."""

    def flush(self) -> None:  # noqa: B027  # nothing to do where write() leaves nothing behind
        """Make durable what `write` has left in memory."""

    def close(self) -> None:  # noqa: B027  # not every destination needs closing
        """Release the destination. Called once; nothing is written afterwards."""


class Batch:
    """Records on their way to the host, without waiting for the device."""

    def __init__(self, records: Sequence[ClipRecord]) -> None:
        self.records = records
        columns = [
            torch.stack([getattr(record, name) for record in records])
            for name in ("norms", "thresholds", "coefficients")
        ]
        self._event: torch.cuda.Event | None = None
        values = torch.stack(columns)
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.cpu()

    def arrived(self) -> bool:
        """Tell whether `rows` returns without waiting."""
        return self._event is None or self._event.query()

    def rows(self, counters: Counters, order: float) -> list[LoggedStep]:
        """Return the records as plain numbers and count them; waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        norms, thresholds, coefficients = self._host.to(torch.float64)
        finite = norms.isfinite()
        only = norms.shape[1] == 1
        columns = zip(
            self.records,
            _totals(norms, order).tolist(),
            _totals(clipped(norms, coefficients), order).tolist(),
            thresholds[:, 0].tolist(),
            coefficients.amin(1).tolist(),
            finite.sum(1).tolist(),
            (finite & (coefficients < 1)).sum(1).tolist(),
            strict=True,
        )
        rows = []
        for record, norm, clipped_norm, threshold, coefficient, count, exceeded in columns:
            nonfinite = count < norms.shape[1]
            counters.count(count, exceeded, nonfinite=nonfinite, skipped=record.skipped)
            rows.append(
                LoggedStep(
                    step=record.step,
                    wall_time=record.wall_time,
                    norm=norm,
                    clipped_norm=clipped_norm,
                    threshold=threshold if only and threshold < math.inf else None,
                    coefficient=coefficient,
                    nonfinite=nonfinite,
                    skipped=record.skipped,
                    clip_rate=counters.clip_rate,
                    nonfinite_steps=counters.nonfinite_steps,
                    skipped_steps=counters.skipped_steps,
                )
            )
        return rows


def _totals(norms: Tensor, order: float) -> Tensor:
    return norms[:, 0] if norms.shape[1] == 1 else torch.linalg.vector_norm(norms, order, 1)


@dataclass(slots=True)
class RecordBuffer:
    """Keeps records on the device and hands them to the host in batches."""

    capacity: int
    order: float
    _waiting: list[ClipRecord] = field(default_factory=list)
    sent: list[Batch] = field(default_factory=list)

    def append(self, record: ClipRecord) -> None:
        """Keep a record; a full buffer starts its copy to the host. No host sync."""
        if self._waiting and not _alike(self._waiting[-1], record):
            self._send()
        self._waiting.append(record)
        if len(self._waiting) >= self.capacity:
            self._send()

    def take(self, counters: Counters, *, wait: bool = False) -> list[LoggedStep]:
        """Return and count what has arrived; with ``wait`` everything, waiting for the device."""
        if wait and self._waiting:
            self._send()
        rows: list[LoggedStep] = []
        while self.sent and (wait or self.sent[0].arrived()):
            rows += self.sent.pop(0).rows(counters, self.order)
        return rows

    def _send(self) -> None:
        batch, self._waiting = self._waiting, []
        self.sent.append(Batch(batch))


def _alike(one: ClipRecord, other: ClipRecord) -> bool:
    return one.norms.shape == other.norms.shape and one.norms.device == other.norms.device
