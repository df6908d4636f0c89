"""Counts the steps of a run and turns batches of records into rows of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from .buffer import Batch
from .incidents import incident_of, loss_incident_of, vanishing_incident_of
from .logged_step import LoggedStep
from .loss_history import LossHistory
from .norm_history import SHOWN, NormHistory
from .parameter_norms import ParameterNorms
from .record import clipped_norms


class MicroBatchCounts(NamedTuple):
    """Numbers of micro-batches that `GradientClipper.micro_batch` has clipped, if need be."""

    taken: int
    """All of them."""
    clipped: int
    """Those with a finite norm above its threshold."""
    nonfinite: int
    """Those with a norm that was NaN or infinite."""

    def with_those(self, added: Tensor | None) -> MicroBatchCounts:
        """Return the sums with counts in the same order, shape (3,). Host sync."""
        if added is None:
            return self
        counts = zip(self, added.tolist(), strict=True)
        return MicroBatchCounts(*(count + int(more) for count, more in counts))


NO_MICRO_BATCHES = MicroBatchCounts(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the start of training."""

    clipped: int = 0
    """Finite norms that were reduced: their coefficient is below 1."""
    finite: int = 0
    """Finite norms."""
    nonfinite_steps: int = 0
    """Steps with a norm that was not finite."""
    skipped_steps: int = 0
    """Skipped steps."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last step that was taken."""
    micro_batches: MicroBatchCounts = NO_MICRO_BATCHES

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that were reduced; 0 before the first."""
        return self.clipped / max(self.finite, 1)


class StepCounter:
    """Counts the steps of each batch that reaches the host.

    Args:
        order: p of the norm, for the total over several norms.
        observed: True if clipping is only observed.
    """

    def __init__(self, order: float, *, observed: bool = False) -> None:
        self._order = order
        self._observed = True if observed else None
        self.counters = Counters()
        self.overflowed = 0
        """Records of steps that GradScaler skipped: they are no steps, and the later ones move up
        by as many indices."""
        self.forget()
        self._longest_run = 0
        self.watched: dict[str, int] = {}
        """Parameters whose optimizer normalises their gradient, with the index of their norm."""

    def forget(self) -> None:
        """Forget the norms and losses before, which belong to another part of the training."""
        self.history = NormHistory()
        self._losses = LossHistory()

    def rows(self, batch: Batch, *, parameter_norms: bool) -> list[LoggedStep]:
        """Count the steps of a batch and return a row for each. Waits for the copy of the batch.

        Args:
            batch: Records on their way to the host.
            parameter_norms: Whether the rows have the norms of the parameters.
        """
        steps = self._counted(batch)
        if steps is None:
            return []
        by_parameter, losses = batch.parameter_norms(self._order), batch.losses()
        weight_norms = batch.weight_norms(self._order)
        if steps.taken is not None:
            taken = steps.taken.tolist()
            by_parameter, losses = [*compress(by_parameter, taken)], [*compress(losses, taken)]
            weight_norms = [*compress(weight_norms, taken)]
        coefficients = steps.coefficients.tolist() if self.watched else [()] * len(losses)
        seen = (steps.indices, steps.totals, coefficients, by_parameter, losses)
        incidents = [self._incident(*step) for step in zip(*seen, strict=True)]
        clipped, finite, nonfinite_steps, skipped_steps = steps.counts
        columns = (  # in the order of the fields
            steps.indices,
            steps.wall_times,
            steps.totals,
            self._totals(clipped_norms(steps.norms, steps.coefficients)).tolist(),
            _single_thresholds(steps.thresholds),
            steps.coefficients.amin(1).tolist(),
            steps.nonfinite.tolist(),
            steps.skipped.tolist(),
            (clipped.double() / finite.clamp(min=1)).tolist(),
            nonfinite_steps.tolist(),
            skipped_steps.tolist(),
            [norms() if parameter_norms else None for norms in by_parameter],
            incidents,
            losses,
            *_micro_batch_columns(steps.micro_batches),
            weight_norms,
            [None if norms is None else norms.update_ratios for norms in weight_norms],
            [self._observed] * len(losses),
        )
        return [LoggedStep(*row) for row in zip(*columns, strict=True)]

    def _incident(
        self,
        step: int,
        norm: float,
        coefficients: Sequence[float],
        parameter_norms: Callable[[], ParameterNorms | None],
        loss: float | None,
    ) -> str | None:
        """Return the sentences about a step that stands out, and remember its norm and loss."""
        sentences = [incident_of(step, norm, parameter_norms, self.history)]
        self.history.add(norm)  # only now: a spike is compared with the norms before it
        if loss is not None:
            sentences.append(loss_incident_of(step, loss, self._losses))
            self._losses.add(loss)
        if self.watched:
            vanishing = vanishing_incident_of(step, coefficients, parameter_norms, self.watched)
            sentences.append(vanishing)
        return " ".join(filter(None, sentences)) or None

    def count(self, batch: Batch) -> None:
        """Count the steps of a batch that no sink wants. Waits for the copy of the batch."""
        steps = self._counted(batch)
        if steps is not None:
            for norm in steps.totals[-SHOWN:]:  # an error shows no more; there are no incidents
                self.history.add(norm)

    def pop_longest_run(self) -> int:
        """Return the longest run of skips that the host learned of since the last call."""
        longest, self._longest_run = self._longest_run, 0
        return longest

    def _counted(self, batch: Batch) -> CountedSteps | None:
        """Count the steps of a batch; None if GradScaler skipped all of them."""
        values, skipped, overflowed = batch.values(), batch.skipped(), batch.overflowed()
        taken = None if overflowed is None else ~overflowed
        indices, wall_times = self._indices(batch, overflowed)
        micro_batches = self._counted_micro_batches(batch)
        if not indices:
            return None
        if taken is not None:
            values, skipped = values[:, taken], skipped[taken]
            micro_batches = micro_batches[taken]
        norms, thresholds, coefficients = values
        finite = norms.isfinite()
        nonfinite = ~finite.all(1)
        clipped = (coefficients < 1) & finite
        counts = torch.stack((clipped.sum(1), finite.sum(1), nonfinite, skipped)).cumsum(1)
        counts += _column(self.counters)
        run = self._run_of_skips(skipped.tolist(), batch.has_device_flags)
        reduced, known, nonfinite_steps, skipped_steps = counts[:, -1].tolist()
        self.counters = Counters(
            reduced, known, nonfinite_steps, skipped_steps, run, self.counters.micro_batches
        )
        totals = self._totals(norms).tolist()
        return CountedSteps(
            taken,
            indices,
            wall_times,
            norms,
            thresholds,
            coefficients,
            nonfinite,
            skipped,
            totals,
            counts,
            micro_batches,
        )

    def _counted_micro_batches(self, batch: Batch) -> Tensor:
        """Count the micro-batches of a batch, also of steps that GradScaler skipped.

        Returns:
            The counts after each record, shape (records, 3).
        """
        before = torch.tensor(self.counters.micro_batches, device="cpu")
        added = batch.micro_batches()
        if added is None:
            return before.expand(len(batch.records), 3)
        counts = added.to(torch.int64).cumsum(0) + before
        newest = MicroBatchCounts(*counts[-1].tolist())
        self.counters = replace(self.counters, micro_batches=newest)
        return counts

    def _indices(self, batch: Batch, overflowed: Tensor | None) -> tuple[list[int], list[float]]:
        """Return the indices and wall times of the steps that GradScaler did not skip."""
        flags = [False] * len(batch.records) if overflowed is None else overflowed.tolist()
        indices, wall_times = [], []
        for record, flag in zip(batch.records, flags, strict=True):
            if flag:
                self.overflowed += 1
            else:
                indices.append(record.step - self.overflowed)
                wall_times.append(record.wall_time)
        return indices, wall_times

    def _run_of_skips(self, skipped: Sequence[bool], has_device_flags: bool) -> int:
        """Return how many steps in a row are skipped at the end of a batch.

        The longest run within it counts where only the device knew of the skips: the host has
        checked the limit at each step that it skipped itself.
        """
        run = self.counters.skipped_in_a_row
        for flag in skipped:
            run = run + 1 if flag else 0
            self._longest_run = max(self._longest_run, run if has_device_flags else 0)
        return run

    def _totals(self, norms: Tensor) -> Tensor:
        """Return the total norm of each step; a single norm stays as it is, to the bit."""
        if norms.shape[1] == 1:
            return norms[:, 0]
        totals: Tensor = torch.linalg.vector_norm(norms, self._order, 1)
        return totals


@dataclass(frozen=True, slots=True)
class CountedSteps:
    """The n steps of a batch with their k norms, float64 on the host, after they were counted."""

    taken: Tensor | None
    """Which records of the batch these are; None for all of them."""
    indices: list[int]
    wall_times: list[float]
    norms: Tensor
    """Shape (n, k), as the thresholds and coefficients."""
    thresholds: Tensor
    coefficients: Tensor
    nonfinite: Tensor
    """Shape (n,), as the skips."""
    skipped: Tensor
    totals: list[float]
    counts: Tensor
    """The first four `Counters` after each step, shape (4, n)."""
    micro_batches: Tensor
    """The `MicroBatchCounts` after each step, shape (n, 3)."""


def _column(counters: Counters) -> Tensor:
    counts = (counters.clipped, counters.finite, counters.nonfinite_steps, counters.skipped_steps)
    return torch.tensor(counts, device="cpu")[:, None]  # by name: the default device may differ


def _micro_batch_columns(counts: Tensor) -> tuple[list[float | None], list[int | None]]:
    """Return the clip rate and the number of non-finite ones; None before the first micro-batch."""
    rows = counts.tolist()
    rates = [clipped / count if count else None for count, clipped, _ in rows]
    return rates, [nonfinite if count else None for count, _, nonfinite in rows]


def _single_thresholds(thresholds: Tensor) -> list[float | None]:
    """Return the threshold of each step; None if there is none, or more than one."""
    if thresholds.shape[1] > 1:
        return [None] * len(thresholds)
    return [limit if limit < math.inf else None for limit in thresholds[:, 0].tolist()]
