"""Records of the steps that a CUDA graph replays, written by the device while no Python runs."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from ..ranks.shared_loss import NO_LOSS
from .buffer import wait_for_device
from .record import ClipRecord, flag_per_norm

CAPACITY = 10_000
"""Records kept if there is one norm."""
MOST_NUMBERS = 1 << 19
"""Numbers kept, five for each norm of a record: 4 MB."""


def may_be_captured(record: ClipRecord) -> bool:
    """Return whether a later step like this one may be captured in a CUDA graph."""
    return record.device.type == "cuda"


class ReplayedRecords:
    """A ring of the newest records, written at every replay of the captured step.

    Make it before the capture: memory that is made within a capture belongs to the graph.

    Args:
        norms: Norms of a step, for their number, device and dtype.
    """

    def __init__(self, norms: Tensor) -> None:
        count = norms.numel()
        self.capacity = max(1, min(CAPACITY, MOST_NUMBERS // (5 * max(1, count))))
        self._rows = norms.new_zeros(self.capacity, 5, count)
        self._losses = norms.new_full((self.capacity,), NO_LOSS)
        self._has_losses = False
        """True once a captured step has a loss: the ring then holds that of every step."""
        self._written = norms.new_zeros(1, dtype=torch.int64)
        self._taken = 0
        self._time = time.time()
        self._captured = False

    def fits(self, count: int, device: torch.device) -> bool:
        """Return whether the record of so many norms on a device fits in."""
        return self._rows.shape[2] == count and self._rows.device == device

    def write(self, record: ClipRecord) -> None:
        """Write a record; a captured write is repeated at every replay. No host sync."""
        norms = record.norms
        flags = [flag_per_norm(flag, norms) for flag in (record.skipped, record.overflow)]
        row = torch.stack((norms, record.thresholds, record.coefficients, *flags))
        # The place in the ring is computed on the device: a graph would repeat a number of Python.
        place = self._written % self.capacity
        self._rows.index_copy_(0, place, row.unsqueeze(0))
        loss = record.loss
        self._has_losses |= loss is not None
        if loss is not None:
            self._losses.index_copy_(0, place, loss.to(self._losses).unsqueeze(0))
        elif self._has_losses:
            self._losses.index_fill_(0, place, NO_LOSS)
        self._written += 1
        if not self._captured:
            self._captured, self._time = True, time.time()

    def take(self, step: int) -> tuple[int, list[ClipRecord]]:
        """Return how many steps were replayed since the last call, and the records that are left.

        Waits for the device if a step was captured. The device has no clock: wall times are spread
        evenly over the time since the last call.

        Args:
            step: Index of the first replayed step.

        Warns:
            RuntimeWarning: Records were overwritten.
        """
        if not self._captured:
            return 0, []
        wait_for_device(self._written.device)
        written = int(self._written.item())
        replayed, begun, now = written - self._taken, self._time, time.time()
        if not replayed:
            return 0, []
        kept = min(replayed, self.capacity)
        if kept < replayed:
            warnings.warn(
                f"{replayed - kept} records of replayed steps were overwritten before they were "
                "read, so no log and no counter has them: call flush() at least every "
                f"{self.capacity} replays.",
                RuntimeWarning,
                stacklevel=4,
            )
        indices = torch.arange(written - kept, written, device=self._rows.device) % self.capacity
        rows, losses = self._rows[indices].cpu(), self._losses[indices].tolist()
        self._taken, self._time = written, now
        records = []
        for index, (row, loss) in enumerate(zip(rows, losses, strict=True), replayed - kept):
            wall_time = begun + (now - begun) * (index + 1) / replayed
            flags = row[3, 0] > 0, row[4, 0] > 0
            values = (row[0], row[1], row[2])
            given = None if loss == NO_LOSS else loss
            records.append(ClipRecord(step + index, wall_time, *values, *flags, loss=given))
        return replayed, records
