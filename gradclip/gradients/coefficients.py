"""The clipping formula ``min(1, threshold / norm)``, for norms that are not finite as well.

Every other module calls these functions, so that the formula is in one place. Here and elsewhere
"finite" is tested as ``norm < inf``: one comparison, false for NaN as well as for infinity.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..engines.base import host_may_read


def clip_coefficients(
    norms: Tensor, thresholds: Tensor | float, erase: bool, finite: Tensor | None = None
) -> Tensor:
    """Return ``min(1, threshold / norm)`` for every norm.

    The formula of Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural
    networks" (2013), without an epsilon: a clipped norm is the threshold itself.

    Args:
        norms: Shape (k,), not negative, or NaN.
        thresholds: Shape (k,), not negative, infinity for no threshold, same device and dtype; or
            one number for all norms.
        erase: True if the coefficient of a NaN or infinite norm is 0, which erases its gradients;
            False if it is 1, which leaves them unchanged.
        finite: ``norms < inf``, if that was computed before.

    Returns:
        Shape (k,) in [0, 1]; exactly 1 where the norm is at most its threshold. No host sync.
    """
    if norms.numel() == 1 and host_may_read(norms):
        # One norm on the CPU is the usual case, and Python numbers take a fraction of the time of
        # tensor operators.
        threshold = thresholds if isinstance(thresholds, float) else thresholds.item()
        coefficient = clip_coefficient(norms.item(), threshold, erase)
        if coefficient == 1:
            return _one(norms.dtype)
        # Not full_like(norms): a norm that a user gives may be of a subclass of Tensor, and the
        # default device may be another one.
        return torch.full((1,), coefficient, dtype=norms.dtype, device="cpu")
    if isinstance(thresholds, float):
        # torch takes number / tensor for number * (1 / tensor), which is infinite for the smallest
        # norms. A 0-d tensor on the CPU is a number to every device, and is divided.
        thresholds = torch.tensor(thresholds, dtype=norms.dtype, device="cpu")
    # As few operators as there can be, since each takes the host microseconds on a device. The
    # quotient of a norm above its threshold never rounds up to 1.
    if erase:
        finite = norms < math.inf if finite is None else finite
        # `fmin` takes the other one where 0 / 0 is NaN, and True and False as 1 and 0.
        return torch.fmin(thresholds / norms, finite)
    # Norms that are not finite as norms of 0, which exceed nothing.
    quotients = thresholds / norms.nan_to_num(nan=0.0, posinf=0.0)
    return quotients.nan_to_num_(nan=1.0, posinf=1.0).clamp_(max=1.0)


def are_finite(norms: Tensor | float) -> bool:
    """Return whether all norms are finite. Host sync."""
    if isinstance(norms, float):
        return norms < math.inf
    return norms.item() < math.inf if norms.numel() == 1 else bool((norms < math.inf).all())


@lru_cache(maxsize=4)
def _one(dtype: torch.dtype) -> Tensor:
    return torch.ones(1, dtype=dtype, device="cpu")


def has_skip_reason(
    norms: Tensor, thresholds: Tensor, *, nonfinite: bool, exceeding: bool
) -> Tensor:
    """Return whether a norm gives a reason to skip the step.

    Args:
        norms: Shape (k,), not negative, or NaN.
        thresholds: Shape (k,), same device and dtype.
        nonfinite: True if a NaN or infinite norm is a reason.
        exceeding: True if a finite norm above its threshold is a reason; one of the two is True.

    Returns:
        0-d, bool, on the same device. No host sync.
    """
    finite = norms < math.inf
    if not exceeding:
        return ~finite.all()
    exceeded = norms > thresholds
    return (exceeded | ~finite if nonfinite else exceeded & finite).any()


def ones_if_skipped(skipped: bool | Tensor, coefficients: Tensor) -> Tensor:
    """Return the coefficients, or 1 for all of them if the step is skipped. No host sync."""
    if isinstance(skipped, Tensor):
        return coefficients.masked_fill(skipped, 1.0)
    return torch.ones_like(coefficients) if skipped else coefficients


def reduction_of(coefficients: Tensor, bounded: Tensor, norms: Tensor) -> Tensor:
    """Return the factor by which bounding and scaling together reduce each norm; shape (k,).

    Args:
        coefficients: Shape (k,), the factors of the scaling.
        bounded: Shape (k,), the norms after bounding; the object ``norms`` if nothing is bounded.
        norms: Shape (k,), as measured.
    """
    if bounded is norms:
        return coefficients
    # Bounding leaves norms of 0 and norms that are not finite, for which the quotient is NaN.
    ratio = torch.where((norms > 0) & (norms < math.inf), bounded / norms, 1.0)
    return coefficients * ratio


def clip_coefficient(norm: float, threshold: float, erase: bool) -> float:
    """Return the coefficient of one norm that is a number; see `clip_coefficients`."""
    if not norm < math.inf:
        return 0.0 if erase else 1.0
    return threshold / norm if norm > threshold else 1.0
