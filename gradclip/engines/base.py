"""The verbs that every engine offers: power sums, scaling, an element-wise bound.

An engine works on plain lists of tensors of one device and one dtype. It knows
nothing of scopes, thresholds or ranks, and keeps no state between calls.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

INFINITY = math.inf


class Engine(ABC):
    """Three verbs over gradients of one device and one dtype.

    Called by `gradclip.norms` (measuring) and `GradientClipper` (writing), always with
    gradient tracking off. Tensors are real floating-point tensors when they are measured and
    may be complex when they are scaled; any strides, any shape, 0-d and empty ones included.
    """

    name: str
    """What a user types for ``engine=`` and reads in ``clipper.engine``."""

    @abstractmethod
    def power_sums(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """Return the sum of ``|x| ** order`` of each tensor, the largest ``|x|`` for infinity.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.

        Returns:
            Shape (n,), float64 (float32 where the device has no float64), on the tensors'
            device. NaN and infinite elements make their tensor's sum NaN or infinite; an
            empty tensor's sum is 0.
        """

    @abstractmethod
    def scale_(self, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
        """Multiply in place, touching no memory where the coefficient is 1.

        A coefficient of 0 writes zeros, also over elements that are NaN or infinite.

        Args:
            tensors: n gradients of one device and dtype.
            coefficients: In [0, 1], shape (1,) for one that serves all or (n,) for one each,
                on the tensors' device.
        """

    @abstractmethod
    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor) -> None:
        """Limit every element to [-bound, bound] in place, touching no tensor that fits already.

        An infinite bound leaves everything as it is, NaN stays NaN.

        Args:
            tensors: n real gradients of one device and dtype.
            bounds: Not negative, shape (1,) for one that serves all or (n,) for one each, on
                the tensors' device.
        """


def norm_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which norms are kept: float64, or float32 where the device lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
