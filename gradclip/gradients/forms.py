"""Converts a gradient of any dtype and layout to the real strided tensors that engines take.

Engines take real strided tensors only. A complex, sparse or distributed gradient therefore has two
forms: one to measure and one to write, which share memory wherever the form allows it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.base import REAL
from ..errors import GradientError
from ..ranks.shards import is_dtensor, is_pending, local_of, stored

COMPLEX = (torch.complex64, torch.complex128)


def refuse_unordered(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients whose elements have no order, or no value yet, and cannot be bounded.

    Raises:
        GradientError: A complex gradient, or a DTensor whose sum over ranks is pending.
    """
    for gradient in gradients:
        if gradient.is_complex():
            raise GradientError(
                f"Found a gradient of dtype {gradient.dtype} and max_value: complex elements "
                "cannot be bounded one by one. Set max_value to None."
            )
        if is_dtensor(gradient) and is_pending(gradient):
            raise GradientError(
                f"Found a gradient with placements {tuple(gradient.placements)} and max_value: "
                "elements whose sum over ranks is pending cannot be bounded. Set max_value to "
                "None, or redistribute() the gradient to Replicate first."
            )


def coalesce_(gradients: Iterable[Tensor]) -> bool:
    """Sum the duplicate entries of sparse gradients in place, before elements are bounded.

    A bound applies to an element, which is the sum of its duplicates.

    Returns:
        True if a gradient was not coalesced. Buckets made before hold its old values.
    """
    uncoalesced = [g for g in gradients if g.is_sparse and not g.is_coalesced()]
    for gradient in uncoalesced:
        gradient.copy_(gradient.coalesce())
    return bool(uncoalesced)


def forms_of(gradient: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the tensor to measure and the tensor to write, both real and strided.

    Scaling the second scales the norm of the first. Both are the gradient itself if it is real,
    strided and on one rank.

    Args:
        gradient: The gradient. Not written.
        order: p of the norm.

    Raises:
        GradientError: A dtype or layout that cannot be clipped.
    """
    _refuse_unfit(gradient)
    measured = written = gradient
    if is_dtensor(gradient):
        measured, written = local_of(gradient), stored(gradient)
    if gradient.layout is torch.sparse_coo:
        # Measured as the sum of its duplicates, while scaling every duplicate scales that sum.
        measured, written = gradient.coalesce()._values(), gradient._values()
    if written.is_complex():
        # For p = 2, |a + bi|^2 = a^2 + b^2: the real view has the same norm and needs no copy.
        measured = _as_real(measured) if order == 2 else _moduli(measured)
        written = _as_real(written)
    return measured, written


def _moduli(tensor: Tensor) -> Tensor:
    """Return absolute values in float64: in the gradient's own precision they could overflow."""
    if norm_dtype(tensor.device) is torch.float64:
        tensor = tensor.to(torch.complex128)
    return tensor.abs()


def _as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor as real numbers in the same memory.

    torch.view_as_real refuses a lazy conjugate. Its base differs in the signs of the imaginary
    parts only, which neither a norm nor a factor depends on.
    """
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _refuse_unfit(gradient: Tensor) -> None:
    if not isinstance(gradient, Tensor):
        raise GradientError(
            f"Found a {type(gradient).__name__} among the gradients: give tensors only."
        )
    found = f"a gradient of dtype {gradient.dtype} and shape {tuple(gradient.shape)}"
    if gradient.dtype not in REAL + COMPLEX:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in REAL + COMPLEX)
        raise GradientError(
            f"Found {found}: gradients must have one of the dtypes {names}. "
            "Convert the gradient, or exclude its parameter."
        )
    if gradient.layout not in (torch.strided, torch.sparse_coo):
        raise GradientError(
            f"Found {found} in layout {gradient.layout}: the layouts that can be clipped in place "
            "are torch.strided and torch.sparse_coo. Convert the gradient with to_dense() or "
            "to_sparse()."
        )
