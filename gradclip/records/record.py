"""The record of one step: tensors on the device, or numbers that become tensors when read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.base import CPU
from ..ranks.shared_loss import host_mean_loss, mean_loss
from .parameter_norms import ParameterSums
from .weight_sums import WeightSums

_set = object.__setattr__


class ClipRecord:
    """The norms, thresholds and coefficients of one step, on the device.

    ``norms``, ``thresholds`` and ``coefficients`` are vectors with one entry per label. ``norm``,
    ``threshold`` and the like are 0-d tensors if there is one norm, else tensors of shape (k,) in
    the order of `GradientClipper.labels`. All are computed when they are read. Only the repr waits
    for the device.
    <!-- test: tests/logging/test_records.py; tests/behaviour/clipper/test_usual_step.py -k reader;
    tests/behaviour/devices/test_waiting.py -k says_that -->
    """

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    values: tuple[Any, Any, Any]
    """Norms, thresholds and coefficients as given: three tensors, or three numbers."""
    is_number: bool
    """True if the values are numbers."""
    count: int
    """k, the number of norms."""
    skipped: bool | Tensor
    """Whether the whole step was skipped; 0-d, bool, if only the device knows."""
    overflow: Tensor | None
    """Whether GradScaler skipped the step, which then does not count: 0-d, bool, if only the device
    knows, else None."""
    parameter_sums: ParameterSums | None
    """The power sum of each parameter's gradient, for the logs."""
    given_loss: float | Tensor | None
    """The loss as given: a number; or 0-d; or a sum and a count, shape (2,)."""
    micro_batches: Tensor | None
    """Numbers of micro-batches of the step: all, clipped, and with a norm not finite; shape (3,).
    None without micro-batches."""
    weight_sums: WeightSums | None
    """The power sums of the parameters and of their changes, at steps that log them."""
    __slots__ = (
        *("count", "given_loss", "is_number", "micro_batches", "overflow", "parameter_sums"),
        *("skipped", "step", "values", "wall_time", "weight_sums"),
    )

    def __init__(
        self,
        step: int,
        wall_time: float,
        norms: Tensor | float,
        thresholds: Tensor | float,
        coefficients: Tensor | float,
        skipped: bool | Tensor = False,
        overflow: Tensor | None = None,
        parameter_sums: ParameterSums | None = None,
        loss: float | Tensor | None = None,
        micro_batches: Tensor | None = None,
    ) -> None:
        is_number = isinstance(norms, float)
        _set(self, "step", step)
        _set(self, "wall_time", wall_time)
        _set(self, "values", (norms, thresholds, coefficients))
        _set(self, "is_number", is_number)
        _set(self, "count", 1 if is_number else norms.numel())  # type: ignore[union-attr]
        _set(self, "skipped", skipped)
        _set(self, "overflow", overflow)
        _set(self, "parameter_sums", parameter_sums)
        _set(self, "given_loss", loss)
        _set(self, "micro_batches", micro_batches)
        _set(self, "weight_sums", None)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A ClipRecord cannot be changed: found a new {name}.")

    @property
    def device(self) -> torch.device:
        """The device of the norms."""
        return CPU if self.is_number else self.values[0].device

    @property
    def norms(self) -> Tensor:
        """Norms as measured; shape (k,)."""
        return as_vector(self.values[0])

    @property
    def thresholds(self) -> Tensor:
        """Largest norms allowed; shape (k,)."""
        return as_vector(self.values[1])

    @property
    def coefficients(self) -> Tensor:
        """Factors by which the norms were reduced; shape (k,)."""
        return as_vector(self.values[2])

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
        """True where the norm was NaN or infinite, bool."""
        return ~self.norm.isfinite()

    @property
    def loss(self) -> Tensor | None:
        """Loss of the step, 0-d; None if none was given.

        Across ranks, the mean over the ranks that gave one. On a device it is minus infinity if no
        rank gave one, because the host does not know.
        <!-- test: tests/ranks/test_losses.py -k mean; tests/behaviour/clipper/test_loss.py
        -k replays_without -->
        """
        loss = self.given_loss
        if isinstance(loss, Tensor):
            return mean_loss(loss) if loss.dim() else loss
        return None if loss is None else as_vector(loss).squeeze(0)

    def __repr__(self) -> str:
        names = ["step", "norm", "clipped_norm", "threshold", "coefficient", "nonfinite"]
        if self.given_loss is not None:
            names.append("loss")
        return f"ClipRecord({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __getstate__(self) -> list[Any]:
        """Return the arguments of the constructor, in order."""
        vectors = (self.norms, self.thresholds, self.coefficients)
        flags = (self.skipped, self.overflow, self.parameter_sums)
        rest = (self.given_loss, self.micro_batches)
        return [self.step, self.wall_time, *vectors, *flags, *rest]

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def loss_on_host(given: float | Tensor | None) -> float | None:
    """Return the number of `ClipRecord.given_loss`, None if no rank gave one. Host sync."""
    if not isinstance(given, Tensor):
        return given
    return host_mean_loss(given.tolist(), 1.0) if given.numel() == 2 else given.item()


def add_micro_batches(record: ClipRecord, micro_batches: Tensor | None) -> None:
    """Complete a record by the micro-batches of its step; see `ClipRecord`."""
    _set(record, "micro_batches", micro_batches)


def add_weight_sums(record: ClipRecord, weight_sums: WeightSums) -> None:
    """Complete a record by the parameters of its step; see `ClipRecord`."""
    _set(record, "weight_sums", weight_sums)


def before_own_clipping(record: ClipRecord, factor: float | Tensor, order: float) -> ClipRecord:
    """Return the record of a step whose optimizer clips as well, with the norms before that.

    Args:
        record: The record, with the norms that the optimizer has left.
        factor: By which the optimizer has multiplied all gradients before.
        order: p of the norms.
    """
    norms, thresholds, coefficients = record.values
    return ClipRecord(
        record.step,
        record.wall_time,
        norms / factor,
        thresholds,
        coefficients * factor,
        record.skipped,
        record.overflow,
        record.parameter_sums and record.parameter_sums.divided(factor, order),
        record.given_loss,
    )


def clipped_norms(norms: Any, coefficients: Any) -> Any:
    """Return the norms after scaling: 0 where a coefficient is 0, even if the norm is infinite.

    Args:
        norms: Shape (k,), or one norm as a number.
        coefficients: As the norms.
    """
    if isinstance(norms, float):
        return norms * coefficients if coefficients else 0.0
    # By where and not by the product alone: infinity times 0 is NaN.
    return torch.where(coefficients == 0, 0.0, norms * coefficients)


def flag_per_norm(flag: bool | Tensor | None, norms: Tensor) -> Tensor:
    """Return a flag as a number for each norm, 0 or 1, so that it travels beside the norms."""
    return torch.zeros_like(norms) + (False if flag is None else flag)


def as_vector(values: Tensor | float) -> Tensor:
    """Return a tensor as it is, and a number as a new tensor of shape (1,) on the CPU."""
    if isinstance(values, Tensor):
        return values
    return torch.full((1,), values, dtype=norm_dtype(CPU), device=CPU)


def _as_scalar(values: Tensor) -> Tensor:
    return values.squeeze(0) if values.numel() == 1 else values
