"""Clipping without a hook: the names of ``torch.nn.utils``, plain tensors, the backward pass.

All norms are measured with float64 accumulation, whatever the gradients' dtype, and returned as
plain 0-d float64 tensors (float32 where the device has no float64) on the first gradient's
device. Gradients below the threshold are not written. On a CUDA device nothing waits for it,
unless ``error_if_nonfinite`` is true or the gradients lie on several devices.

In what ``torch.compile`` makes, each but `clip_backward` is one operator, of `compiled`: it does
what is done elsewhere, bit by bit, also with ``fullgraph=True``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import checked_bound, checked_order
from ..engines.base import host_may_read, norm_dtype
from ..errors import ArgumentError, GradientError, NonFiniteGradientError
from ..gradients.buckets import Bucket, buckets_of
from ..gradients.coefficients import clip_coefficients
from ..gradients.forms import coalesce_, refuse_unordered
from ..gradients.held import distinct
from ..gradients.norms import norms_of
from ..ranks.groups import RankGroup
from ..ranks.shards import groups_of
from .operators import norm_like, nothing, operator

TensorOrTensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of the gradients of parameters, in place.

    The same name and signature as ``torch.nn.utils.clip_grad_norm_``. Where the norm is not
    finite the gradients stay as they are. Of DTensors it is the norm of the whole, and the call
    collective.

    >>> import torch, gradclip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> gradclip.clip_grad_norm_([weight], max_norm=1.0)
    tensor(5., dtype=torch.float64)
    >>> weight.grad
    tensor([0.6000, 0.8000])

    Args:
        parameters: A tensor or an iterable of tensors, read once; those without a gradient are
            passed over, those given twice count once.
        max_norm: Largest norm allowed, 0 or more; inf measures and writes nothing.
        norm_type: p of the p-norm, positive or inf.
        error_if_nonfinite: Raise where the norm is NaN or infinite. Host sync.
        foreach: Accepted for the sake of the signature; the engine is chosen by the device.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        ArgumentError: ``max_norm`` or ``norm_type`` is no such number.
        GradientError: A gradient whose dtype or layout cannot be clipped.
        NonFiniteGradientError: The norm is not finite, with ``error_if_nonfinite``.
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = listed_parameters(parameters)
    return _clip_norm_(_gradients(listed), limit, order, error_if_nonfinite, **_across(listed))


def clip_gradients_(tensors: TensorOrTensors, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clip the norm of gradients that are given as tensors, in place.

    For gradients of ``torch.func``, ``torch.autograd.grad`` or one's own formulas. As
    `clip_grad_norm_`, but what is given is what is scaled.

    Args:
        tensors: A tensor or an iterable of tensors, read once.
        max_norm: Largest norm allowed, 0 or more; inf measures and writes nothing.
        norm_type: p of the p-norm, positive or inf.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        ArgumentError: ``max_norm`` or ``norm_type`` is no such number.
        GradientError: A gradient whose dtype or layout cannot be clipped.
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = _listed(tensors)
    return _clip_norm_(listed, limit, order, False, **_across(listed))


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Limit every element of the gradients of parameters to [-clip_value, clip_value], in place.

    The same name and signature as ``torch.nn.utils.clip_grad_value_``. Gradients without a larger
    element are not written; NaN stays NaN.

    Args:
        parameters: A tensor or an iterable of tensors, read once.
        clip_value: Largest magnitude allowed, 0 or more.
        foreach: Accepted for the sake of the signature; the engine is chosen by the device.

    Raises:
        ArgumentError: ``clip_value`` is no such number.
        GradientError: A gradient that is complex, or whose dtype or layout cannot be clipped.
    """
    bound = checked_bound("clip_value", clip_value, infinite=True)
    _clip_value_(listed_gradients(parameters), bound)


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the norm of all tensors together.

    The same name and signature as ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: A tensor or an iterable of tensors, read once. Not written.
        norm_type: p of the p-norm, positive or inf.
        error_if_nonfinite: Raise where the norm is NaN or infinite. Host sync.
        foreach: Accepted for the sake of the signature; the engine is chosen by the device.

    Returns:
        The norm, 0-d.

    Raises:
        ArgumentError: ``norm_type`` is no such number.
        GradientError: A tensor whose dtype or layout has no norm here.
        NonFiniteGradientError: The norm is not finite, with ``error_if_nonfinite``.
    """
    order = checked_order(norm_type)
    listed = _listed(tensors)
    if error_if_nonfinite:
        # What writes nothing the compiler leaves out, error and all, where the norm is not used.
        return _clip_norm_(listed, math.inf, order, True, **_across(listed))
    return _total_norm(listed, order, **_across(listed))


def clip_grads_with_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients of parameters by ``min(1, max_norm / total_norm)``, in place.

    The same name and signature as ``torch.nn.utils.clip_grads_with_norm_``. Where the norm is not
    finite the gradients stay as they are.

    Args:
        parameters: A tensor or an iterable of tensors, read once.
        max_norm: Largest norm allowed, 0 or more.
        total_norm: The norm as `get_total_norm` measured it, a tensor of one element.
        foreach: Accepted for the sake of the signature; the engine is chosen by the device.

    Raises:
        ArgumentError: ``max_norm`` or ``total_norm`` is no such number.
        GradientError: A gradient whose dtype or layout cannot be clipped.
    """
    limit = checked_bound("max_norm", max_norm, infinite=True)
    if not isinstance(total_norm, Tensor) or total_norm.numel() != 1:
        raise ArgumentError(
            f"total_norm is {total_norm!r}: give the tensor of one element that "
            "get_total_norm() returned."
        )
    _clip_with_norm_(listed_gradients(parameters), limit, total_norm)


@operator(
    "clip_norm_(Tensor(a!)[] gradients, float limit, float order, bool finite) -> Tensor", norm_like
)
def _clip_norm_(
    gradients: list[Tensor],
    limit: float,
    order: float,
    finite: bool,
    groups: Sequence[RankGroup] = (),
) -> Tensor:
    buckets = buckets_of(distinct(gradients), order)
    norm = norms_of(buckets, order, scalar=True, groups=groups)
    if finite and not bool(norm.isfinite()):
        raise NonFiniteGradientError(
            f"The norm of the gradients is {norm.item()}: it must be finite with "
            "error_if_nonfinite=True. The gradients are as they were; error_if_nonfinite=False "
            "returns such a norm instead."
        )
    _scale_(buckets, norm, limit)
    return norm


@operator("total_norm(Tensor[] tensors, float order) -> Tensor", norm_like)
def _total_norm(tensors: list[Tensor], order: float, groups: Sequence[RankGroup] = ()) -> Tensor:
    return norms_of(buckets_of(distinct(tensors), order), order, scalar=True, groups=groups)


@operator("clip_with_norm_(Tensor(a!)[] gradients, float limit, Tensor norm) -> ()", nothing)
def _clip_with_norm_(gradients: list[Tensor], limit: float, norm: Tensor) -> None:
    _scale_(buckets_of(distinct(gradients), 2.0), norm, limit)


@operator("clip_value_(Tensor(a!)[] gradients, float bound) -> ()", nothing)
def _clip_value_(gradients: list[Tensor], bound: float) -> None:
    gradients = distinct(gradients)
    refuse_unordered(gradients)
    buckets = buckets_of(gradients, math.inf)  # refuses before anything is written
    if coalesce_(gradients):
        buckets = buckets_of(gradients, math.inf)
    for bucket in buckets:
        dtype = norm_dtype(bucket.device)
        bucket.clamp_("auto", torch.full((1,), bound, dtype=dtype, device=bucket.device))


def _scale_(buckets: list[Bucket], norm: Tensor, limit: float) -> None:
    if limit == math.inf or (host_may_read(norm) and norm.item() <= limit):
        return
    wide = norm.reshape(1).to(norm_dtype(norm.device))  # a user's may be in half precision
    coefficients = clip_coefficients(wide, limit, erase=False)
    for bucket in buckets:
        bucket.scale_("auto", coefficients)


def _across(tensors: Sequence[Tensor]) -> dict[str, Sequence[RankGroup]]:
    """Return the ranks that tensors are spread over, where they are, as an argument.

    Operators of compiled code, in which there are none, do not know of it.
    """
    groups = () if torch.compiler.is_compiling() else groups_of(tensors)
    return {"groups": groups} if groups else {}


def _listed(tensors: TensorOrTensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def listed_parameters(parameters: TensorOrTensors) -> list[Tensor]:
    """Return parameters as a list, read once.

    Raises:
        GradientError: One of them is no tensor.
    """
    listed = _listed(parameters)
    for kind in {*map(type, listed)}:
        if not issubclass(kind, Tensor) and not all(isinstance(p, Tensor) for p in listed):
            raise GradientError(
                f"Found a {kind.__name__} among the parameters: give tensors only, as "
                "model.parameters() does."
            )
    return listed


def listed_gradients(parameters: TensorOrTensors) -> list[Tensor]:
    """Return the gradients that parameters have; one object as often as they share it."""
    return _gradients(listed_parameters(parameters))


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [g for p in parameters for g in [p.grad] if g is not None]
