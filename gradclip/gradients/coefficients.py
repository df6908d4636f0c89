"""The formula, and the rule for norms that are not finite; nowhere else."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..engines.base import host_may_read


def clip_coefficients(norms: Tensor, thresholds: Tensor | float, erase: bool) -> Tensor:
    """Return ``min(1, threshold / norm)`` for every norm.

    The formula of Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
    networks" (2013), without an epsilon: a clipped norm is the threshold itself.

    Args:
        norms: Shape (k,), not negative; NaN and infinity are not finite.
        thresholds: Shape (k,), not negative, infinity for none, same device and dtype; or one
            number for all.
        erase: Whether the coefficient of a norm that is not finite is 0, which erases its
            gradients, or 1, which leaves them as they are.

    Returns:
        Shape (k,) in [0, 1]; exactly 1 where the norm is at most its threshold. No host sync.
    """
    if norms.numel() == 1 and host_may_read(norms):
        # The usual case, in which numbers are several times as fast as operators.
        threshold = thresholds if isinstance(thresholds, float) else thresholds.item()
        coefficient = _coefficient(norms.item(), threshold, erase)
        if coefficient == 1:
            return _one(norms.dtype)
        # A plain tensor, whatever kind of tensor a user's norm is.
        return torch.full((1,), coefficient, dtype=norms.dtype, device="cpu")
    exceeded = torch.where(norms > thresholds, thresholds / norms, 1.0)
    return torch.where(norms < math.inf, exceeded, 0.0 if erase else 1.0)


def are_finite(norms: Tensor) -> bool:
    """Tell whether no norm is NaN or infinite. Host sync."""
    return norms.item() < math.inf if norms.numel() == 1 else bool((norms < math.inf).all())


@lru_cache(maxsize=4)
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype, device="cpu")


def has_skip_reason(
    norms: Tensor, thresholds: Tensor, *, nonfinite: bool, exceeding: bool
) -> Tensor:
    """Tell whether a step has to be left out.

    Args:
        norms: Shape (k,), not negative; NaN and infinity are not finite.
        thresholds: Shape (k,), same device and dtype.
        nonfinite: Whether a norm that is not finite is a reason.
        exceeding: Whether a finite norm above its threshold is a reason.

    Returns:
        0-d, bool, on the same device. No host sync.
    """
    finite = norms < math.inf
    reasons = torch.zeros_like(finite)
    if nonfinite:
        reasons = ~finite
    if exceeding:
        reasons = reasons | (finite & (norms > thresholds))
    return reasons.any()


def ones_if_skipped(skipped: bool | Tensor, coefficients: Tensor) -> Tensor:
    """Return the coefficients, or 1 for all of them where the step is left out. No host sync."""
    if isinstance(skipped, Tensor):
        return torch.where(skipped, 1.0, coefficients)
    return torch.ones_like(coefficients) if skipped else coefficients


def reduction_of(coefficients: Tensor, bounded: Tensor, norms: Tensor) -> Tensor:
    """Return by how much norms shrink when their elements are bounded first, then scaled.

    Args:
        coefficients: Shape (k,), of the scaling.
        bounded: Shape (k,), the norms after bounding; the very norms where nothing was.
        norms: Shape (k,), as measured. One of 0 or none that is finite is not bounded.
    """
    if bounded is norms:
        return coefficients
    ratio = torch.where((norms > 0) & (norms < math.inf), bounded / norms, 1.0)
    return coefficients * ratio


def _coefficient(norm: float, threshold: float, erase: bool) -> float:
    if not norm < math.inf:
        return 0.0 if erase else 1.0
    return threshold / norm if norm > threshold else 1.0
