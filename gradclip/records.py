"""What a step leaves behind: its record on the device, its row on the host, where rows go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .parts import Parts


@dataclass(frozen=True, slots=True, eq=False)
class ClipRecord:
    """What one step's clipping found and did, on the device.

    The fields are vectors with one entry per label. The properties are what a user reads:
    0-d tensors where there is one norm, else of shape (k,) in the order of
    ``GradientClipper.labels``. They are made when they are read; nothing here waits for the
    device, but the repr.
    """

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    norms: Tensor
    thresholds: Tensor
    coefficients: Tensor
    skipped: bool | Tensor = False
    """Whether the whole step was left out; 0-d, bool, where only the device knows."""
    overflow: Tensor | None = None
    """Where only the device knows it: whether GradScaler left the step out, so that it does not
    count; 0-d, bool."""
    parts: Parts | None = None
    """What each parameter had in the norms, for those that log it."""

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
        return ~self.norm.isfinite()

    def __repr__(self) -> str:
        names = ("step", "norm", "clipped_norm", "threshold", "coefficient", "nonfinite")
        return f"ClipRecord({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def clipped(norms: Tensor, coefficients: Tensor) -> Tensor:
    """Return the norms after scaling: 0 where a coefficient is 0, also for an infinite norm."""
    return torch.where(coefficients == 0, 0.0, norms * coefficients)


def spread(flag: bool | Tensor | None, norms: Tensor) -> Tensor:
    """Return a flag as a number for each norm, 0 or 1."""
    return torch.zeros_like(norms) + (False if flag is None else flag)


def _as_scalar(values: Tensor) -> Tensor:
    return values.squeeze(0) if values.numel() == 1 else values


class LoggedStep(NamedTuple):
    """One step as a sink gets it: plain numbers, totals over all norms, counts since the start."""

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    norm: float
    """Total norm before clipping; NaN or infinite where the gradients were."""
    clipped_norm: float
    """Total norm afterwards."""
    threshold: float | None
    """The threshold, None where there is none or more than one."""
    coefficient: float
    """The smallest coefficient."""
    nonfinite: bool
    """Whether a norm was NaN or infinite."""
    skipped: bool
    """Whether the whole step was left out."""
    clip_rate: float
    """Share of the finite norms so far that were reduced; 0 before the first."""
    nonfinite_steps: int
    """Steps so far with a norm that was not finite."""
    skipped_steps: int
    """Steps so far that were left out."""
    parameter_norms: Mapping[str, float] | None = None
    """Norms of the gradients by the names of their parameters, before clipping; None where they
    are not known, as in a CUDA graph, or were not asked for."""
    incident: str | None = None
    """What there is to say of a step whose norm was not finite, or far above those before."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What has been counted since the start of training."""

    clipped: int = 0
    """Finite norms that were reduced: their coefficient is below 1."""
    finite: int = 0
    """Finite norms."""
    nonfinite_steps: int = 0
    """Steps with a norm that was not finite."""
    skipped_steps: int = 0
    """Steps that were left out."""
    skipped_in_a_row: int = 0
    """Steps that were left out since the last one that was taken."""

    @property
    def clip_rate(self) -> float:
        """Share of the finite norms that were reduced; 0 before the first."""
        return self.clipped / max(self.finite, 1)


class Sink(ABC):
    """Where logged steps go; the one thing to derive from for a destination of one's own.

    Called by the clipper with batches, never within the arithmetic of a step. The step that
    completes a batch waits for it, so that one that is slow should hand its work on. A sink that
    raises is reported once as a warning and never stops training: it misses that batch and is given
    the next. One sink serves one clipper.

    >>> import gradclip
    >>> class Largest(gradclip.Sink):
    ...     norm = 0.0
    ...
    ...     def write(self, steps):
    ...         self.norm = max(self.norm, *(step.norm for step in steps))
    """

    flush_every: int = 100
    """Steps per batch: how many a crash may lose. Of several sinks, the smallest counts."""
    per_parameter: int | str = 0
    """Whether it wants `LoggedStep.parameter_norms`; where not 0, those of all parameters come."""

    def begin(self, settings: Mapping[str, str]) -> None:  # noqa: B027  # few want to know
        """Hear how the clipper is set, by name, before its first step."""

    @abstractmethod
    def write(self, steps: Sequence[LoggedStep]) -> None:
        """Take over a batch in the order of the steps, and leave it safe from a crash."""

    def flush(self) -> None:  # noqa: B027  # nothing to do where write() leaves nothing behind
        """Make durable what `write` has left in memory."""

    def close(self) -> None:  # noqa: B027  # not every destination needs closing
        """Release the destination. Called once; nothing is written afterwards."""
