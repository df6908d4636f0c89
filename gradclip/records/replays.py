"""Records of steps in a captured CUDA graph, which the device writes while no Python runs."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from .buffer import wait_for_device
from .record import ClipRecord, flag_per_norm

CAPACITY = 10_000
"""Records kept for one norm."""
MOST_NUMBERS = 1 << 19
"""Numbers kept, of which a record has five for each norm: 4 MB."""


def may_be_captured(record: ClipRecord) -> bool:
    """Tell whether a step such as the one recorded may be captured later."""
    return record.norms.is_cuda


class ReplayedRecords:
    """A ring of the newest records, written at every replay of the step that was captured.

    It has to be there before the capture, since what is made within belongs to the graph.

    Args:
        norms: Give their number, device and dtype.
    """

    def __init__(self, norms: Tensor) -> None:
        count = norms.numel()
        self.capacity = max(1, min(CAPACITY, MOST_NUMBERS // (5 * max(1, count))))
        self._rows = norms.new_zeros(self.capacity, 5, count)
        self._written = norms.new_zeros(1, dtype=torch.int64)
        self._taken = 0
        self._time = time.time()
        self._captured = False

    def fits(self, norms: Tensor) -> bool:
        """Tell whether there are as many norms, and where they are expected."""
        return self._rows.shape[2] == norms.numel() and self._rows.device == norms.device

    def write(self, record: ClipRecord) -> None:
        """Write a record; within a capture: at every replay. No host sync."""
        norms = record.norms
        skipped, overflow = (
            flag_per_norm(record.skipped, norms),
            flag_per_norm(record.overflow, norms),
        )
        row = torch.stack((norms, record.thresholds, record.coefficients, skipped, overflow))
        self._rows.index_copy_(0, self._written % self.capacity, row.unsqueeze(0))
        self._written += 1
        if not self._captured:
            self._captured, self._time = True, time.time()

    def take(self, step: int) -> tuple[int, list[ClipRecord]]:
        """Return how many steps were replayed since the last call, and the records there are.

        Waits for the device, if a step was captured. Nothing on the device knows the time: steps
        are spread evenly over that since the last call.

        Args:
            step: Index of the first of them.

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
                f"read, and are in no log and no counter: call flush() at least every "
                f"{self.capacity} replays.",
                RuntimeWarning,
                stacklevel=4,
            )
        places = torch.arange(written - kept, written, device=self._rows.device) % self.capacity
        rows = self._rows[places].cpu()
        self._taken, self._time = written, now
        records = []
        for index, row in enumerate(rows, replayed - kept):
            wall_time = begun + (now - begun) * (index + 1) / replayed
            flags = row[3, 0] > 0, row[4, 0] > 0
            records.append(ClipRecord(step + index, wall_time, row[0], row[1], row[2], *flags))
        return replayed, records
