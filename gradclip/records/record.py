"""The record of one step, in tensors on the device, and the counters of all steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parameter_norms import ParameterSums


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
    parameter_sums: ParameterSums | None = None
    """What each parameter had in the norms, for those that log it."""

    @property
    def norm(self) -> Tensor:
        """Norm as measured, before ``max_value`` and before scaling."""
        return _as_scalar(self.norms)

    @property
    def clipped_norm(self) -> Tensor:
        """Norm afterwards, ``norm * coefficient``; 0 where the gradients were erased."""
        return _as_scalar(clipped_norms(self.norms, self.coefficients))

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


def clipped_norms(norms: Tensor, coefficients: Tensor) -> Tensor:
    """Return the norms after scaling: 0 where a coefficient is 0, also for an infinite norm."""
    return torch.where(coefficients == 0, 0.0, norms * coefficients)


def flag_per_norm(flag: bool | Tensor | None, norms: Tensor) -> Tensor:
    """Return a flag as a number for each norm, 0 or 1."""
    return torch.zeros_like(norms) + (False if flag is None else flag)


def _as_scalar(values: Tensor) -> Tensor:
    return values.squeeze(0) if values.numel() == 1 else values


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
