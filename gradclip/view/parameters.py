"""Numbers of single parameters for the page: the largest value in each bucket of steps."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..report.run import LoggedParameterNorms
from .arrays import Json, packed


class ParameterTable:
    """The numbers of all parameters of a run, of one quantity, the largest first.

    Args:
        logged: The numbers, at those steps at which they were logged.
        ranks: A number for each name by which they are sorted, the largest first; names of equal
            rank stay in the order of the log, which is that of the model.
    """

    def __init__(self, logged: LoggedParameterNorms, ranks: NDArray[np.float64]) -> None:
        self._logged = logged
        self._order = np.argsort(-ranks, kind="stable")

    @cached_property
    def names(self) -> list[str]:
        """All names, the largest first."""
        return [self._logged.names[index] for index in self._order]

    def answer(self, first: float, last: float, buckets: int, search: str, most: int) -> Json:
        """Return the largest values of some parameters in buckets of the steps of a range.

        Args:
            first: First step of the range.
            last: Last step of the range, included.
            buckets: Most buckets, at least 1.
            search: Only parameters whose name contains this, in either case.
            most: Most parameters.
        """
        logged, wanted = self._logged, search.casefold()
        matching = [i for i in self._order if wanted in logged.names[i].casefold()]
        shown = matching[:most]
        begin = int(np.searchsorted(logged.steps, first, side="left"))
        end = int(np.searchsorted(logged.steps, last, side="right"))
        part = slice(begin, end)
        steps, indices = np.unique(logged.steps[part], return_inverse=True)
        columns = min(len(steps), buckets)
        column_of_step = np.arange(len(steps)) * columns // max(len(steps), 1)
        row_of_name = np.full(len(logged.names), -1)
        row_of_name[shown] = np.arange(len(shown))
        rows = row_of_name[logged.name_indices[part]]
        kept = rows >= 0
        cells = rows[kept], column_of_step[indices[kept]]
        values = logged.norms[part][kept].astype(np.float32)
        finite = np.isfinite(values)
        largest = np.full((len(shown), columns), -np.inf, np.float32)
        np.maximum.at(largest, cells, np.where(finite, values, -np.inf))
        broken = np.zeros(largest.shape, dtype=bool)
        broken[cells[0][~finite], cells[1][~finite]] = True
        return {
            "names": [logged.names[index] for index in shown],
            "matching": len(matching),
            "steps": packed(steps[np.flatnonzero(np.diff(column_of_step, prepend=-1))]),
            "end": int(steps[-1]) if len(steps) else None,
            "high": packed(np.where(largest > -np.inf, largest, np.nan).astype(np.float64)),
            "nonfinite": packed(broken),
        }


def mean_values(logged: LoggedParameterNorms) -> NDArray[np.float64]:
    """Return the mean of the finite values of each name, 0 without one."""
    finite = np.isfinite(logged.norms)
    names, values = logged.name_indices[finite], logged.norms[finite]
    counts = np.bincount(names, minlength=len(logged.names))
    # Divided before they are added: the sum of values near the end of float64 overflows.
    parts = values / np.maximum(counts, 1)[names]
    return np.bincount(names, parts, len(logged.names)).astype(np.float64)
