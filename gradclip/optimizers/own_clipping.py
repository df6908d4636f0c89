"""Recognizes an optimizer that clips in its own ``step``, before it calls its parent's.

The clipper clips in the parent's step, and would see only what the optimizer has left. The log is
to show the norm before, and the norm with which the parameters are changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engines.base import REAL, has_values, host_may_read
from ..gradients.buckets import buckets_of
from ..gradients.norms import norms_of

SAMPLE = 8
"""Elements of each gradient that are compared; the norm is that of all."""
ROUNDINGS = 4
"""Units of rounding by which a scaled element may differ from the exact product."""


class GradientsBefore:
    """The gradients at the beginning of an optimizer's step, in a few numbers.

    Args:
        gradients: The distinct gradients. Not written.
    """

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._count = len(gradients) if all(map(_is_plain, gradients)) else 0
        if self._count:
            self._sample, self._norm = _sample_of(gradients), _norm_of(gradients)

    def factor(self, gradients: Sequence[Tensor]) -> float | Tensor | None:
        """Return the factor below 1 by which all gradients were multiplied since.

        No host sync.

        Returns:
            The factor; None if there was none, as in a step that averages gradients; on a device
            0-d, and 1 for none.
        """
        if not self._count or len(gradients) != self._count or not all(map(_is_plain, gradients)):
            return None
        factor = _norm_of(gradients) / self._norm
        expected, found = self._sample * factor, _sample_of(gradients)
        if expected.shape != found.shape:
            return None
        rounding = max(torch.finfo(gradient.dtype).eps for gradient in gradients)
        allowed = ROUNDINGS * rounding * expected.abs()
        is_scaled = ((found - expected).abs() <= allowed).all() & (factor < 1)
        if not host_may_read(factor):
            return torch.where(is_scaled, factor, 1.0)
        return factor.item() if is_scaled and factor > 0 else None


def _is_plain(gradient: Tensor) -> bool:
    is_real = gradient.dtype in REAL and gradient.layout is torch.strided
    return is_real and type(gradient) is Tensor and has_values(gradient)


def _norm_of(gradients: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return norms_of(buckets_of(gradients, 2.0), 2.0, scalar=True)


def _sample_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return some elements of every gradient as a copy in float64."""
    flat = [gradient.detach().reshape(-1) for gradient in gradients]
    parts = [values[:: max(1, len(values) // SAMPLE)].double() for values in flat]
    return torch.cat([part.to(parts[0].device) for part in parts])
