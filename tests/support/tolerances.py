"""How exact gradclip has to be: the one table of tolerances.

With u the unit roundoff of the gradient's dtype and e its smallest subnormal, a clipped norm is
within ``threshold (1e-6 + 2 u) + sqrt(n) e / 2`` of its threshold. A measured norm is within 1e-6
of the norm in float64, relatively.
"""

from __future__ import annotations

import math

import torch

NORM = 1e-6
"""Relative error of a measured norm, in every dtype and at every size."""

ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
"""Unit roundoff u by dtype."""


def clipped_norm_error(threshold: float, dtype: torch.dtype, count: int) -> float:
    """Return by how much a clipped norm of so many elements may differ from its threshold."""
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return threshold * (NORM + 2 * ROUNDOFF[dtype]) + math.sqrt(count) * subnormal / 2


def element_error(dtype: torch.dtype) -> float:
    """Return by how much, relatively, a scaled element may differ from the exact product."""
    return NORM + 2 * ROUNDOFF[dtype]
