"""The verbs that every engine offers: norm, power sums, scaling, an element-wise bound.

An engine works on plain lists of tensors of one device and one dtype. It knows
nothing of scopes, thresholds or ranks, and keeps no state between calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from ..errors import EngineUnavailableError

INFINITY = math.inf


class TensorList(list[Tensor]):
    """Tensors that are measured first and written after, with nothing changed between.

    An engine may note on it what it has found out about them.
    """

    note: object = None


class Engine(ABC):
    """Verbs over gradients of one device and one dtype.

    Called by `gradclip.gradients.norms` (measuring) and `GradientClipper` (writing), always with
    gradient tracking off. Tensors are real floating-point ones of any strides and any shape, 0-d
    and empty ones included. Elements that share a place in memory count one by one when they are
    measured, and each place is written once.
    """

    name: str
    """What a user types for ``engine=`` and reads in ``clipper.engine``."""

    def unsupported(self, device: torch.device) -> str | None:
        """Return why a device is not served, as an error says it; None where it is."""
        return None

    def check_supported(self, device: torch.device) -> None:
        """Check that a device is served.

        Raises:
            EngineUnavailableError: It is not.
        """
        reason = self.unsupported(device)
        if reason is not None:
            raise EngineUnavailableError(reason)

    @abstractmethod
    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """Return the sum of ``|x| ** order`` of each tensor, the largest ``|x|`` for infinity.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.
            rows: One sum for each index of dimension 0, which every tensor has then, instead of
                one for each tensor.

        Returns:
            Shape (n,) or (number of all rows,), float64 (float32 where the device has no
            float64), on the tensors' device. NaN and infinite elements make their sum NaN or
            infinite; the sum of no elements is 0.
        """

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """Return the norm of all tensors together, the usual case, which may have a shorter way.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.
            scalar: Whether a 0-d tensor is wanted.

        Returns:
            Shape (1,) or (), otherwise as `power_sums`.
        """
        sums = self.power_sums(tensors, order)
        if order == INFINITY:
            return sums.amax(0, keepdim=not scalar)
        return root(sums.sum(0, keepdim=not scalar), order)

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """Return the norm of all tensors together, to the bit what `norm` returns, and their sums.

        An engine that finds both at once says how; this one reads twice.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.

        Returns:
            Shapes (1,) and (n,), as those of `norm` and `power_sums`.
        """
        return self.norm(tensors, order), self.power_sums(tensors, order)

    @abstractmethod
    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """Multiply in place, touching no memory where the coefficient rounds to 1.

        A coefficient of 0 writes zeros, also over elements that are NaN or infinite.

        Args:
            tensors: n gradients of one device and dtype.
            coefficients: In [0, 1], on the tensors' device, shape (1,) for one that serves all or
                (n,) for one each; with ``rows`` (1,) or (number of all rows,).
            rows: One coefficient for each index of dimension 0. No two rows share memory.
        """

    @abstractmethod
    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """Limit every element to [-bound, bound] in place, touching no tensor that fits already.

        The bound is rounded to the tensors' dtype. An infinite one leaves everything as it is,
        NaN stays NaN.

        Args:
            tensors: n gradients of one device and dtype.
            bounds: Not negative, on the tensors' device, shape (1,) for one that serves all or
                (n,) for one each; with ``rows`` (1,) or (number of all rows,).
            rows: One bound for each index of dimension 0. No two rows share memory.
        """


def root(power_sums: Tensor, order: float) -> Tensor:
    """Return the p-norms of which these are the power sums, in their memory."""
    return power_sums.sqrt_() if order == 2 else power_sums.pow_(1 / order)


def host_may_read(tensor: Tensor) -> bool:
    """Tell whether the host knows the values without waiting for a device."""
    return tensor.is_cpu


def norm_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are kept: float64, or float32 where the device lacks float64."""
    if device.type == "mps" or (device.type == "xpu" and not _has_float64(device)):
        return torch.float32
    return torch.float64


@cache
def _has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def rounds_to_one(coefficient: float, dtype: torch.dtype) -> bool:
    """Tell whether a product with the coefficient is the gradient itself.

    Products of float64 gradients are computed in float64, all others in float32 or better.
    """
    return coefficient >= (1 if dtype is torch.float64 else 1 - 2.0**-25)


def rounded_bounds(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bounds as the dtype holds them; finite ones stay finite, as torch's clamp needs."""
    rounded = bounds.clamp(max=torch.finfo(dtype).max).to(dtype).to(bounds.dtype)
    return torch.where(bounds < INFINITY, rounded, bounds)
