"""The record of one step, in tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .parameter_norms import ParameterSums


@dataclass(frozen=True, slots=True, eq=False)
class ClipRecord:
    """The norms, thresholds and coefficients of one step, on the device.

    The fields are vectors with one entry per label. The properties are what a user reads: 0-d
    tensors if there is one norm, else tensors of shape (k,) in the order of
    ``GradientClipper.labels``. They are computed when they are read. Nothing here waits for the
    device, except the repr.
    """

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    norms: Tensor
    thresholds: Tensor
    coefficients: Tensor
    skipped: bool | Tensor = False
    """Whether the whole step was skipped; 0-d, bool, if only the device knows."""
    overflow: Tensor | None = None
    """Whether GradScaler skipped the step, which then does not count: 0-d, bool, if only the
    device knows, else None."""
    parameter_sums: ParameterSums | None = None
    """The power sum of each parameter's gradient, for the logs."""

    @property
    def norm(self) -> Tensor:
        """Norm as measured, before ``max_value`` and before scaling."""
        return _as_scalar(self.norms)

    @property
    def clipped_norm(self) -> Tensor:
        """Norm afterwards, ``norm * coefficient``; 0 if the gradients were set to 0."""
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
    """Return the norms after scaling: 0 where a coefficient is 0, even if the norm is infinite."""
    # By where and not by the product alone: infinity times 0 is NaN.
    return torch.where(coefficients == 0, 0.0, norms * coefficients)


def flag_per_norm(flag: bool | Tensor | None, norms: Tensor) -> Tensor:
    """Return a flag as a number for each norm, 0 or 1, so that it travels beside the norms."""
    return torch.zeros_like(norms) + (False if flag is None else flag)


def _as_scalar(values: Tensor) -> Tensor:
    return values.squeeze(0) if values.numel() == 1 else values
