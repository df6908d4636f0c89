"""How exact gradclip has to be: the one table of tolerances.

With u the unit roundoff of the gradient's dtype and e its smallest subnormal, a clipped norm is
within ``threshold (1e-6 + 2 u) + n**(1/p) e / 2`` of its threshold. A measured norm is within 1e-6
of the norm in float64, relatively.
"""

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


def clipped_norm_error(
    threshold: float, dtype: torch.dtype, count: int, order: float = 2.0
) -> float:
    """Return by how much a clipped norm of so many elements may differ from its threshold."""
    spread = count ** (0 if order == math.inf else 1 / order)
    return threshold * (NORM + 2 * ROUNDOFF[dtype]) + spread * smallest(dtype) / 2


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest subnormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def element_error(dtype: torch.dtype) -> float:
    """Return by how much, relatively, a scaled element may differ from the exact product."""
    return NORM + 2 * ROUNDOFF[dtype]
