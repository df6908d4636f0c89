"""Keeps records on the device and copies them to the host in batches, without waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .parameter_norms import ParameterNorms
from .record import ClipRecord, flag_per_norm, loss_on_host
from .weight_sums import WeightNorms, weight_norms_of

MOST_NORMS = 1 << 18
"""Norms per batch, including those of parameters: records then take at most about 10 MB."""


class RecordBuffer:
    """Keeps records where they are until a batch is full.

    Args:
        capacity: Records per batch; fewer if each has many norms.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[ClipRecord] = []
        self._is_full = False
        self._sent: list[Batch] = []

    def append(self, record: ClipRecord) -> bool:
        """Keep a record; a full buffer starts its copy to the host. No host sync on CUDA.

        Returns:
            True if a batch is on its way, which `take` may yield.
        """
        if self._is_full or (self._waiting and not _can_share_batch(self._waiting[-1], record)):
            self._send()
        self._waiting.append(record)
        count, numbers, sums = len(self._waiting), record.count, record.parameter_sums
        if sums is not None:
            numbers += len(sums.names)
        if record.weight_sums is not None:
            numbers += 2 * len(record.weight_sums.names)
        self._is_full = count >= self._capacity or count * numbers >= MOST_NORMS
        if self._is_full and not _is_open(record):
            self._send()
        return bool(self._sent)

    def send(self) -> bool:
        """Start the copy of what is complete. No host sync on CUDA; see `append`."""
        if self._waiting and not _is_open(self._waiting[-1]):
            self._send()
        return bool(self._sent)

    def take(self, *, wait: bool) -> Iterator[Batch]:
        """Yield the batches that have arrived; with ``wait`` all, after waiting for the device."""
        if wait and self._waiting:
            wait_for_device(self._waiting[-1].device)
            self._send()
        while self._sent and (wait or self._sent[0].arrived()):
            yield self._sent.pop(0)

    def _send(self) -> None:
        batch, self._waiting, self._is_full = self._waiting, [], False
        self._sent.append(Batch(batch))


class Batch:
    """Records of one device and one number of norms, on their way to the host.

    On CUDA the copy goes to pinned memory and is read only after its event is done. Elsewhere
    the host waits for it here, once a batch.

    Args:
        records: At least one.
    """

    def __init__(self, records: Sequence[ClipRecord]) -> None:
        self.records = records
        self.has_device_flags = any(
            isinstance(record.skipped, Tensor) or record.overflow is not None for record in records
        )
        """Whether only the device knows if some of the steps were skipped."""
        values = _stacked(records, self.has_device_flags)
        measured = [sums for record in records if (sums := record.parameter_sums) is not None]
        vectors = [vector.to(values.device) for sums in measured for vector in sums.sums]
        self._weights = [record.weight_sums for record in records]
        of_weights = [v for each in self._weights if each for v in each.vectors]
        self._given_losses = [record.given_loss for record in records]
        held = [loss.reshape(-1) for loss in self._given_losses if isinstance(loss, Tensor)]
        # Losses may lie on another device than norms on the CPU, which would wait for them here.
        device = held[0].device if held and not values.is_cuda else values.device
        self._host = _on_host(values)
        self._sums = _on_host(torch.cat(vectors)) if vectors else None
        self._weight_sums = None
        if of_weights:
            self._weight_sums = _on_host(torch.cat([v.to(values.device) for v in of_weights]))
        self._losses = _on_host(torch.cat([loss.to(device) for loss in held])) if held else None
        counts = [record.micro_batches for record in records]
        taken = [count for count in counts if count is not None]
        self._micro_batches = None
        if taken:
            none = torch.zeros_like(taken[0])
            rows = [none if count is None else count for count in counts]
            self._micro_batches = _on_host(torch.stack(rows))
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def arrived(self) -> bool:
        """Return whether `values` returns without waiting."""
        return self._event is None or self._event.query()

    def values(self) -> Tensor:
        """Return norms, thresholds and coefficients, shape (3, steps, k), float64 on the host.

        Waits for the copy.
        """
        return self._arrived()[:3]

    def skipped(self) -> Tensor:
        """Return which steps were skipped, shape (steps,), bool on the host. Waits for the copy."""
        if self.has_device_flags:
            return self._arrived()[3, :, 0] > 0
        return torch.tensor([bool(record.skipped) for record in self.records], device="cpu")

    def overflowed(self) -> Tensor | None:
        """Return which steps GradScaler skipped, as `skipped` does; None if the host knows none."""
        return self._arrived()[4, :, 0] > 0 if self.has_device_flags else None

    def losses(self) -> list[float | None]:
        """Return the loss of each step, None for one without a loss. Waits for the copy."""
        losses = self._given_losses
        if self._losses is not None:
            self._arrived()
            sizes = [loss.numel() for loss in losses if isinstance(loss, Tensor)]
            arrived = iter(self._losses.split(sizes))
            losses = [next(arrived) if isinstance(loss, Tensor) else loss for loss in losses]
        return [*map(loss_on_host, losses)]

    def micro_batches(self) -> Tensor | None:
        """Return `ClipRecord.micro_batches` of each step, shape (steps, 3); None for none at all.

        Waits for the copy.
        """
        if self._micro_batches is not None:
            self._arrived()
        return self._micro_batches

    def parameter_norms(self, order: float) -> list[Callable[[], ParameterNorms | None]]:
        """Return what makes the parameter norms of each step, None if unknown. Waits for the copy.

        Most steps are usual ones, whose parameter norms nobody asks for.

        Args:
            order: p of the norms.
        """
        if self._sums is None:
            return [_unknown] * len(self.records)
        self._arrived()
        sums, end = self._sums.to(torch.float64), 0
        norms: list[Callable[[], ParameterNorms | None]] = []
        for record in self.records:
            of_step = record.parameter_sums
            if of_step is None:
                norms.append(_unknown)
            else:
                norms.append(partial(ParameterNorms, of_step, sums, end, order))
                end += len(of_step.names)
        return norms

    def weight_norms(self, order: float) -> list[WeightNorms | None]:
        """Return the norms of the parameters at each step, None if it was not one to measure them.

        Waits for the copy.

        Args:
            order: p of the norms.
        """
        if self._weight_sums is None:
            return [None] * len(self.records)
        self._arrived()
        return weight_norms_of(self._weights, self._weight_sums.to(torch.float64), order)

    def _arrived(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host.to(torch.float64)


def _unknown() -> None:
    """Return no parameter norms."""


def _on_host(values: Tensor) -> Tensor:
    """Return a copy on the host; from CUDA the copy is under way and nothing waits for it."""
    if not values.is_cuda:
        return values.cpu()
    # "cpu" by name, as the default device may be another one.
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    return host.copy_(values, non_blocking=True)


def wait_for_device(device: torch.device) -> None:
    """Wait for all streams: steps may have run on another stream than the one that reads them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stacked(records: Sequence[ClipRecord], flags: bool) -> Tensor:
    """Return all values as one tensor, so that one copy brings them to the host.

    Args:
        records: n records with k norms each.
        flags: Whether to add two rows for steps that were skipped, and for those that GradScaler
            skipped.

    Returns:
        Shape (3 or 5, n, k).
    """
    if all(record.is_number for record in records):
        numbers = [record.values for record in records]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").T.unsqueeze(2)
    rows = [
        [record.norms for record in records],
        [record.thresholds for record in records],
        [record.coefficients for record in records],
    ]
    if flags:
        rows += [
            [flag_per_norm(record.skipped, record.norms) for record in records],
            [flag_per_norm(record.overflow, record.norms) for record in records],
        ]
    # One operator, since a device's host pays for each.
    vectors = [vector for row in rows for vector in row]
    return torch.stack(vectors).view(len(rows), len(records), -1)


def _is_open(record: ClipRecord) -> bool:
    """Return whether other optimizers may still add to the record, which is the newest one."""
    return record.weight_sums is not None and record.weight_sums.is_open


def _can_share_batch(one: ClipRecord, other: ClipRecord) -> bool:
    if one.is_number and other.is_number:
        return True
    return one.count == other.count and one.device == other.device
