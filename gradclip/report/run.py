"""A logged run as arrays with one entry per step, and its assembly from single steps."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..records.logged_step import LoggedStep
from ..records.sinks.tags import PARAMETER_TAGS

NumbersByName: TypeAlias = Mapping[str, float | None]
"""Numbers of the parameters of one step by name; None for one that is NaN or infinite."""


@dataclass(frozen=True)
class LoggedParameterNorms:
    """Numbers of single parameters: one entry per logged number, in the order of the steps.

    This is a list of entries and not a table: only some steps log norms of parameters, and not
    always those of the same parameters. What was not logged takes no memory.
    """

    names: tuple[str, ...]
    """Names of the parameters, in the order in which they were first logged."""
    steps: NDArray[np.int64]
    """Index of the step of each entry, never falling."""
    name_indices: NDArray[np.int32]
    """Index into ``names`` of each entry."""
    norms: NDArray[np.float64]
    """The numbers: norms of gradients before clipping or of weights before the step, or ratios of
    updates; NaN or infinite where they were logged so."""


@dataclass(frozen=True)
class LoggedScalar:
    """Another number that was logged beside a run, such as the loss of a trainer."""

    steps: NDArray[np.int64]
    """Indices of the steps that log it, rising."""
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The steps of a run, in arrays of equal length, in the order of the steps."""

    name: str
    """File or directory that the run was read from."""
    steps: NDArray[np.int64]
    """Indices of the steps, rising."""
    norms: NDArray[np.float64]
    """Total norms before clipping; NaN or infinite where they were logged so."""
    clipped_norms: NDArray[np.float64]
    """Total norms after clipping."""
    thresholds: NDArray[np.float64]
    """Thresholds; NaN at steps that had none or more than one."""
    skipped: NDArray[np.bool_]
    """True at skipped steps."""
    parameter_norms: LoggedParameterNorms | None = None
    """Gradient norms of single parameters; None if none were logged."""
    losses: NDArray[np.float64] | None = None
    """Losses; infinite where they were logged as not finite, NaN at steps without one; None if no
    step has one."""
    weight_norms: LoggedParameterNorms | None = None
    """Norms of the weights of single parameters, at the steps that log them; None without any."""
    update_ratios: LoggedParameterNorms | None = None
    """Norms of the updates of single parameters, divided by those of their weights before."""
    sentences: Mapping[int, str] = dataclass_field(default_factory=dict)
    """What the clipper said of steps that stand out, by step."""
    scalars: Mapping[str, LoggedScalar] = dataclass_field(default_factory=dict)
    """Other numbers in the same files, by tag."""
    observed: bool = False
    """True if clipping was only observed: the clipped norms are those that it would have given."""

    def __len__(self) -> int:
        return len(self.steps)

    def since(self, index: int) -> Run:
        """Return the norms of the run without its first steps; no losses, no norms of parameters.

        Args:
            index: How many steps are left out.
        """
        return Run(
            self.name,
            self.steps[index:],
            self.norms[index:],
            self.clipped_norms[index:],
            self.thresholds[index:],
            self.skipped[index:],
            observed=self.observed,
        )

    @cached_property
    def finite(self) -> NDArray[np.bool_]:
        """True at steps with a finite norm."""
        return np.isfinite(self.norms)

    @property
    def nonfinite_steps(self) -> int:
        """Number of norms that are NaN or infinite."""
        return len(self) - int(self.finite.sum())

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps."""
        return int(self.skipped.sum())

    @cached_property
    def clipped(self) -> NDArray[np.bool_]:
        """True at steps whose norm was finite, and above its threshold or reduced.

        Of a run that was only observed, at steps that would have been clipped.
        """
        exceeded = self.norms > self.thresholds  # False where the threshold is NaN
        # With several thresholds none is logged: there only the reduced norm shows the clipping.
        return self.finite & (exceeded | (self.clipped_norms < self.norms))

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that were clipped, as `clipped` says; 0 without a finite norm.

        NaN if it is not known: some trainers log the norms before clipping alone.
        """
        if len(self) and np.isnan(self.clipped_norms).all() and np.isnan(self.thresholds).all():
            return math.nan
        return float(self.clipped.sum()) / max(int(self.finite.sum()), 1)

    @property
    def changed(self) -> float:
        """Share of the finite norms that clipping has changed; NaN if it is not known."""
        return 0.0 if self.observed else self.clip_rate


STEPS_AS_TUPLES = 1 << 14
"""Steps kept as tuples before they are packed into an array, which takes far less memory."""


class RunBuilder:
    """Collects the steps of a run in the order in which they were logged.

    If a step was logged more than once, the last entry counts. A run that resumes at an earlier
    step therefore replaces everything that an earlier process logged from that step on.

    Args:
        name: Name of the run.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._packed_rows: list[NDArray[np.float64]] = []
        self._packed_count = 0
        self._single_rows: list[tuple[float, ...]] = []
        self._entries = {field: _Entries() for field in PARAMETER_TAGS}
        self._sentences: dict[int, str] = {}
        self.observed = False
        """True if clipping was only observed at the last step."""

    def __bool__(self) -> bool:
        return bool(self._packed_rows or self._single_rows)

    def add_step(
        self,
        row: Sequence[float],
        by_field: Mapping[str, NumbersByName],
        sentence: str | None = None,
    ) -> None:
        """Add one step: a row as `add` takes it, and by field the numbers of its parameters."""
        if sentence is not None:
            self._sentences[self._packed_count + len(self._single_rows)] = sentence
        for field, numbers in by_field.items():
            self._entries[field].add(self._packed_count + len(self._single_rows), numbers)
        self._single_rows.append(tuple(row))
        if len(self._single_rows) == STEPS_AS_TUPLES:
            self._pack()

    def add(
        self,
        rows: Sequence[Sequence[float]] | NDArray[np.float64],
        by_field: Mapping[str, Mapping[int, NumbersByName]],
        sentences: Mapping[int, str],
    ) -> None:
        """Add several steps.

        Args:
            rows: One row per step: index, norm, clipped norm, threshold, 1 if it was skipped,
                and the loss as in `Run.losses`.
            by_field: Numbers of parameters by the field of a `LoggedStep` that has them, and by
                the index of their row.
            sentences: What was said of steps that stand out, by the index of their row.
        """
        self._pack()
        self._sentences.update((self._packed_count + row, said) for row, said in sentences.items())
        for field, by_row in by_field.items():
            for row, numbers in by_row.items():
                self._entries[field].add(self._packed_count + row, numbers)
        self._append(np.asarray(rows, dtype=np.float64))

    def _pack(self) -> None:
        if self._single_rows:
            self._append(np.array(self._single_rows, dtype=np.float64))
            self._single_rows.clear()

    def _append(self, rows: NDArray[np.float64]) -> None:
        self._packed_rows.append(rows)
        self._packed_count += len(rows)

    def run(self) -> Run:
        """Return the run."""
        self._pack()
        rows = np.concatenate(self._packed_rows)
        self._packed_rows = [rows]  # frees the pieces: both would double the peak of memory
        kept = not_replaced(rows[:, 0])
        by_field = {
            field: entries.logged(rows[:, 0], kept) for field, entries in self._entries.items()
        }
        sentences = {int(rows[row, 0]): said for row, said in self._sentences.items() if kept[row]}
        steps, norms, clipped_norms, thresholds, skipped, losses = rows[kept].T
        return Run(
            self._name,
            steps.astype(np.int64),
            norms,
            clipped_norms,
            thresholds,
            skipped.astype(bool),
            by_field["parameter_norms"],
            None if np.isnan(losses).all() else losses,
            by_field["weight_norms"],
            by_field["update_ratios"],
            sentences,
            observed=self.observed,
        )


def not_replaced(steps: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows count: those with no later row of the same or a smaller step.

    Such a row means that a resumed run started again at or before this step.

    Args:
        steps: The step of each row, in the order in which they were logged.
    """
    smallest_later = np.minimum.accumulate(steps[::-1])[::-1]
    kept = np.ones(len(steps), dtype=bool)
    kept[:-1] = steps[:-1] < smallest_later[1:]
    return kept


class _Entries:
    """Numbers of single parameters: row of the step, index of the name, number.

    Typed arrays, because a list of Python numbers would take four times the memory.
    """

    def __init__(self) -> None:
        self._rows, self._names, self._numbers = array("q"), array("i"), array("d")
        self._name_indices: dict[str, int] = {}

    def add(self, row: int, numbers: NumbersByName) -> None:
        """Add the numbers of the parameters of a step."""
        known = self._name_indices
        indices = [known.setdefault(name, len(known)) for name in numbers]
        self._rows.extend([row] * len(indices))
        self._names.extend(indices)
        self._numbers.extend(math.nan if each is None else each for each in numbers.values())

    def logged(
        self, steps: NDArray[np.float64], kept: NDArray[np.bool_]
    ) -> LoggedParameterNorms | None:
        """Return the numbers in the rows that count; None if there are none.

        Args:
            steps: The step of each row.
            kept: True for the rows that count.
        """
        if not self._rows:
            return None
        rows = np.frombuffer(self._rows, np.int64)
        entries = kept[rows]
        if not entries.any():
            return None
        # A name that occurs only in replaced rows is dropped.
        logged_names, name_indices = np.unique(
            np.frombuffer(self._names, np.int32)[entries], return_inverse=True
        )
        names = [*self._name_indices]
        return LoggedParameterNorms(
            tuple(names[index] for index in logged_names),
            steps[rows[entries]].astype(np.int64),
            name_indices.astype(np.int32),
            np.frombuffer(self._numbers)[entries],
        )


def run_of(steps: Iterable[LoggedStep], name: str) -> Run:
    """Return steps as a run; if a step occurs more than once, its last entry counts.

    Args:
        steps: Steps as a sink receives them, at least one.
        name: Name of the run.
    """
    builder = RunBuilder(name)
    for step in steps:
        threshold = math.nan if step.threshold is None else step.threshold
        loss = math.nan if step.loss is None else as_logged_loss(step.loss)
        row = (step.step, step.norm, step.clipped_norm, threshold, step.skipped, loss)
        fields = ((field, getattr(step, field)) for field in PARAMETER_TAGS)
        by_field = {field: numbers for field, numbers in fields if numbers}
        builder.add_step(row, by_field, step.incident)
        builder.observed = bool(step.observed)
    return builder.run()


def as_logged_loss(loss: float | None) -> float:
    """Return a loss as `Run.losses` has it; None is one that JSON could not hold."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def warn_unreadable(path: Path, trouble: str) -> None:
    """Warn that part of a file cannot be read."""
    warnings.warn(f"{path}: {trouble}.", UserWarning, stacklevel=2)
