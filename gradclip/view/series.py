"""Curves for the page: the smallest and the largest value in each bucket of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .arrays import Json, packed
from .gaps import gaps_in

Values: TypeAlias = NDArray[np.float64]


class Buckets:
    """The entries of a range of steps in buckets of equal size, a power of two.

    Buckets begin at multiples of their size, counted from the first entry of the run: they stay
    the same while one pans, and while a run grows. A gap in the steps that is wider than a share of
    the range ends a bucket early: no bucket reaches over it.

    Args:
        steps: Steps of all entries, never falling.
        first: First step of the range.
        last: Last step of the range, included.
        most: Most buckets, at least 1. Two more come where a bucket reaches beyond the range, one
            on each side of it, so that lines can be drawn up to the edges, and one for each gap.
    """

    def __init__(self, steps: NDArray[np.int64], first: float, last: float, most: int) -> None:
        begin = int(np.searchsorted(steps, first, side="left"))
        end = int(np.searchsorted(steps, last, side="right"))
        self.size = 1
        while (end - begin) > most * self.size:
            self.size *= 2
        begin = max(begin // self.size - 1, 0) * self.size
        end = min((-(-end // self.size) + 1) * self.size, len(steps))
        self._entries = slice(begin, end)
        self._steps = steps[self._entries]
        found = gaps_in(steps)
        self._gaps = found[(found > begin) & (found < end)] - begin
        self._begins = np.arange(0, end - begin, self.size)
        if self.size > 1:
            # Narrower gaps cannot be seen, and bursts of steps could have any number of them.
            width = (min(last, steps[-1]) - max(first, steps[0])) / most
            self._gaps = self._gaps[self._steps[self._gaps] - self._steps[self._gaps - 1] > width]
            self._begins = np.union1d(self._begins, self._gaps)

    def header(self) -> Json:
        """Return the steps at which the buckets begin and at which the last one ends, and the gaps.

        A gap is the step of the bucket that follows it, with the last step before it.
        """
        return {
            "size": self.size,
            "steps": packed(self._steps[self._begins]),
            "end": int(self._steps[-1]) if len(self._steps) else None,
            "gaps": {int(self._steps[gap]): int(self._steps[gap - 1]) for gap in self._gaps},
        }

    def extremes(self, values: Values) -> Json | None:
        """Return the smallest and largest finite value of each bucket; None if there is none.

        NaN in buckets without one. If a bucket holds one entry, both are the same and given once.
        """
        part = values[self._entries]
        finite = np.where(np.isfinite(part), part, np.nan)
        if np.isnan(finite).all():
            return None
        if self.size == 1:
            return {"low": packed(finite)}
        low, high = (ufunc.reduceat(finite, self._begins) for ufunc in (np.fmin, np.fmax))
        return {"low": packed(low), "high": packed(high)}

    def counts(self, flags: NDArray[np.bool_]) -> Json | None:
        """Return how many flags are set in each bucket; None if none is."""
        part = flags[self._entries]
        if not part.any():
            return None
        return packed(np.add.reduceat(part.astype(np.int64), self._begins))


def curves(
    buckets: Buckets,
    columns: Mapping[str, Values],
    flags: Mapping[str, NDArray[np.bool_]],
) -> Json:
    """Return columns and flags of the same entries by name, without those that are empty.

    Args:
        buckets: Where the entries are.
        columns: Values of each entry; those that are not finite are left out.
        flags: Marks of each entry.
    """
    extremes = {name: buckets.extremes(values) for name, values in columns.items()}
    counts = {name: buckets.counts(marked) for name, marked in flags.items()}
    return {
        **buckets.header(),
        "columns": {name: found for name, found in extremes.items() if found},
        "counts": {name: found for name, found in counts.items() if found},
    }
