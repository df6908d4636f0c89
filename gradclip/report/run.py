"""A run as it was logged."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..records.logged_step import LoggedStep

NormsByName: TypeAlias = Mapping[str, float | None]
"""Norms of a step's parameters by their names, None for what is no number."""


@dataclass(frozen=True)
class LoggedParameterNorms:
    """Norms of single parameters, an entry for each that was logged, in the order of the steps.

    Only some steps have them, and not always those of the same parameters, so that this is no
    table: it takes no memory for what was not logged.
    """

    names: tuple[str, ...]
    """Of the parameters, in the order in which they were first logged."""
    steps: NDArray[np.int64]
    """Index of the step of each entry, never falling."""
    places: NDArray[np.int32]
    """Whose norm each entry is, as a place in the names."""
    norms: NDArray[np.float64]
    """The norms before clipping; NaN or infinite where they were."""


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
    parameter_norms: LoggedParameterNorms | None = None
    """Norms of single parameters, None where none were logged."""

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

    @cached_property
    def clipped(self) -> NDArray[np.bool_]:
        """Which norms were finite, and reduced or above their threshold."""
        exceeded = self.norms > self.thresholds  # never so where the threshold is NaN
        return self.finite & (exceeded | (self.clipped_norms < self.norms))

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that were above their threshold; 0 where there is none."""
        return float(self.clipped.sum()) / max(int(self.finite.sum()), 1)


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
        self._packed = 0
        self._single: list[tuple[float, ...]] = []
        # Of each norm of a parameter: the row of its step, the place of its name, the norm.
        self._entry_rows, self._entry_places, self._entry_norms = array("q"), array("i"), array("d")
        self._names: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._rows or self._single)

    def add_step(self, row: Sequence[float], parameter_norms: NormsByName | None = None) -> None:
        """Take one step, as `add`, with norms of its parameters."""
        if parameter_norms:
            self._add_entries(self._packed + len(self._single), parameter_norms)
        self._single.append(tuple(row))
        if len(self._single) == AT_ONCE:
            self._pack()

    def add(
        self,
        rows: Sequence[Sequence[float]] | NDArray[np.float64],
        parameter_norms: Mapping[int, NormsByName] | None = None,
    ) -> None:
        """Take steps.

        Args:
            rows: Of each its index, norm, clipped norm, threshold, whether it was skipped.
            parameter_norms: Norms of parameters, by the row that they belong to.
        """
        self._pack()
        for row, norms in (parameter_norms or {}).items():
            self._add_entries(self._packed + row, norms)
        self._append(np.asarray(rows, dtype=np.float64))

    def _add_entries(self, row: int, norms: NormsByName) -> None:
        places = [self._names.setdefault(name, len(self._names)) for name in norms]
        self._entry_rows.extend([row] * len(places))
        self._entry_places.extend(places)
        self._entry_norms.extend(math.nan if each is None else each for each in norms.values())

    def _pack(self) -> None:
        """Move single steps to where they take less memory."""
        if self._single:
            self._append(np.array(self._single, dtype=np.float64))
            self._single.clear()

    def _append(self, rows: NDArray[np.float64]) -> None:
        self._rows.append(rows)
        self._packed += len(rows)

    def run(self) -> Run:
        """Return the run."""
        self._pack()
        rows = np.concatenate(self._rows)
        self._rows = [rows]  # not both: that is half of what reading takes
        # Of what comes twice the later is kept, and what it takes back goes with it.
        later = np.minimum.accumulate(rows[::-1, 0])[::-1]
        kept = np.ones(len(rows), dtype=bool)
        kept[:-1] = rows[:-1, 0] < later[1:]
        parameter_norms = self._parameter_norms(rows[:, 0], kept) if self._names else None
        steps, norms, clipped, thresholds, skipped = rows[kept].T
        return Run(
            self._name,
            steps.astype(np.int64),
            norms,
            clipped,
            thresholds,
            skipped.astype(bool),
            parameter_norms,
        )

    def _parameter_norms(
        self, steps: NDArray[np.float64], kept: NDArray[np.bool_]
    ) -> LoggedParameterNorms | None:
        """Return the norms of parameters in the rows that are kept; None if there are none."""
        rows = np.frombuffer(self._entry_rows, np.int64)
        chosen = kept[rows]
        if not chosen.any():
            return None
        places = np.frombuffer(self._entry_places, np.int32)[chosen]
        logged, found = np.unique(places, return_inverse=True)  # some names may be gone
        names = [*self._names]
        return LoggedParameterNorms(
            tuple(names[place] for place in logged),
            steps[rows[chosen]].astype(np.int64),
            found.astype(np.int32),
            np.frombuffer(self._entry_norms)[chosen],
        )


def run_of(steps: Iterable[LoggedStep], name: str) -> Run:
    """Return steps as a run; where a step comes again the later counts.

    Args:
        steps: As a sink gets them, at least one.
        name: Name of the run.
    """
    columns = Columns(name)
    for step in steps:
        threshold = math.nan if step.threshold is None else step.threshold
        row = (step.step, step.norm, step.clipped_norm, threshold, step.skipped)
        columns.add_step(row, step.parameter_norms)
    return columns.run()


def warn_of(path: Path, what: str) -> None:
    """Warn that part of a file cannot be read; the rest is."""
    warnings.warn(f"{path}: {what}.", UserWarning, stacklevel=2)
