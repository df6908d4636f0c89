"""The real strided tensors behind a gradient: what is measured, and what is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..errors import GradientError
from ..ranks.shards import is_dtensor, is_pending, local_of, stored

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex64, torch.complex128)


def refuse_unordered(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients whose elements cannot be bounded one by one.

    Raises:
        GradientError: A complex gradient, or a sum over ranks that is pending.
    """
    for gradient in gradients:
        if gradient.is_complex():
            raise GradientError(
                f"Found a gradient of dtype {gradient.dtype} and max_value: complex elements "
                "cannot be bounded one by one. Leave max_value at None."
            )
        if is_dtensor(gradient) and is_pending(gradient):
            raise GradientError(
                f"Found a gradient with placements {tuple(gradient.placements)} and max_value: "
                "elements that are still to be added up over ranks cannot be bounded. Leave "
                "max_value at None, or redistribute() it to Replicate first."
            )


def coalesce_(gradients: Iterable[Tensor]) -> bool:
    """Sum the duplicates of sparse gradients in place: what an element is must be known first.

    Returns:
        Whether there were any; buckets made before then hold what is no longer the gradient.
    """
    uncoalesced = [g for g in gradients if g.is_sparse and not g.is_coalesced()]
    for gradient in uncoalesced:
        gradient.copy_(gradient.coalesce())
    return bool(uncoalesced)


def forms_of(gradient: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Return the real strided tensor to measure and the strided tensor to write."""
    _refuse_unfit(gradient)
    measured = written = gradient
    if is_dtensor(gradient):
        measured, written = local_of(gradient), stored(gradient)
    if gradient.layout is torch.sparse_coo:
        measured, written = gradient.coalesce()._values(), gradient._values()
    if written.is_complex():
        measured = _as_real(measured) if order == 2 else _moduli(measured)
        written = _as_real(written)
    return measured, written


def _moduli(tensor: Tensor) -> Tensor:
    """Return absolute values, in float64: in the gradient's own precision they could overflow."""
    if norm_dtype(tensor.device) is torch.float64:
        tensor = tensor.to(torch.complex128)
    return tensor.abs()


def _as_real(tensor: Tensor) -> Tensor:
    """View a complex tensor, or the conjugate that it is a lazy conjugate of, as real numbers."""
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _refuse_unfit(gradient: Tensor) -> None:
    if not isinstance(gradient, Tensor):
        raise GradientError(
            f"Found a {type(gradient).__name__} among the gradients: give tensors only."
        )
    what = f"a gradient of dtype {gradient.dtype} and shape {tuple(gradient.shape)}"
    if gradient.dtype not in REAL + COMPLEX:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in REAL + COMPLEX)
        raise GradientError(
            f"Found {what}: gradients must have one of the dtypes {names}. "
            "Convert it, or leave its parameter out."
        )
    if gradient.layout not in (torch.strided, torch.sparse_coo):
        raise GradientError(
            f"Found {what} in layout {gradient.layout}: the layouts that can be clipped in place "
            "are torch.strided and torch.sparse_coo. Convert it with to_dense() or to_sparse()."
        )
