"""A run as it was logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """The steps of a run, in arrays of one length, in the order of the steps."""

    name: str
    """Where it was read from."""
    steps: NDArray[np.int64]
    """Indices of the steps, rising."""
    norms: NDArray[np.float64]
    """Total norms before clipping; NaN or infinite where they were."""
    clipped_norms: NDArray[np.float64]
    """Total norms afterwards."""
    thresholds: NDArray[np.float64]
    """Thresholds, NaN where there was none or more than one."""
    skipped: NDArray[np.bool_]
    """Which steps were left out."""

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """Which norms were finite."""
        return np.isfinite(self.norms)

    @property
    def nonfinite_steps(self) -> int:
        """How many norms were NaN or infinite."""
        return len(self) - int(self.finite.sum())

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out."""
        return int(self.skipped.sum())

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that were above their threshold; 0 where there is none."""
        known = self.finite & ~np.isnan(self.thresholds)
        exceeded = known & (self.norms > self.thresholds)
        reduced = self.finite & (self.clipped_norms < self.norms)
        return float((exceeded | reduced).sum()) / max(int(self.finite.sum()), 1)


AT_ONCE = 1 << 14
"""Steps that are kept as tuples."""


class Columns:
    """Steps as they come, of which the later counts where one comes again.

    A run that is resumed at an earlier step replaces what an earlier process wrote from there on.

    Args:
        name: Name of the run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[NDArray[np.float64]] = []
        self._single: list[tuple[float, ...]] = []

    def __bool__(self) -> bool:
        return bool(self._rows or self._single)

    def add_step(self, *row: float) -> None:
        """Take one step, as `add`."""
        self._single.append(row)
        if len(self._single) == AT_ONCE:
            self._pack()

    def add(self, rows: Sequence[Sequence[float]] | NDArray[np.float64]) -> None:
        """Take steps: of each its index, norm, clipped norm, threshold, whether it was skipped."""
        self._pack()
        self._rows.append(np.asarray(rows, dtype=np.float64))

    def _pack(self) -> None:
        """Move single steps to where they take less memory."""
        if self._single:
            self._rows.append(np.array(self._single, dtype=np.float64))
            self._single.clear()

    def run(self) -> Run:
        """Return the run."""
        self._pack()
        rows = np.concatenate(self._rows)
        # Of what comes twice the later is kept, and what it takes back goes with it.
        later = np.minimum.accumulate(rows[::-1, 0])[::-1]
        kept = np.ones(len(rows), dtype=bool)
        kept[:-1] = rows[:-1, 0] < later[1:]
        steps, norms, clipped, thresholds, skipped = rows[kept].T
        return Run(
            self._name, steps.astype(np.int64), norms, clipped, thresholds, skipped.astype(bool)
        )
