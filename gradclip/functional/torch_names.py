"""The clipping functions of ``torch.nn.utils`` by the same names, and `clip_gradients_`.

All norms are accumulated in float64, whatever the dtype of the gradients, and returned as plain
0-d float64 tensors (float32 if the device has no float64) on the device of the first gradient.
Gradients whose norm is at most the threshold are not written. No host sync on a CUDA device,
unless ``error_if_nonfinite`` is true or the gradients lie on several devices.

Each function is one operator in code compiled by ``torch.compile``, also with ``fullgraph=True``,
and has the same bits there as in eager code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..checks import checked_bound, checked_order
from ..engines import engine_for
from ..engines.base import CPU, TensorList, host_may_read, norm_dtype
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
    """Scale the gradients of parameters in place, so that their joint norm is at most ``max_norm``.

    The name and signature of ``torch.nn.utils.clip_grad_norm_``. The factor is
    ``min(1, max_norm / norm)`` (Pascanu, Mikolov and Bengio, 2013), without torch's 1e-6. If the
    norm is NaN or infinite, the gradients stay unchanged. For DTensors the norm is that of the full
    tensors, and the call is collective.

    >>> import torch, gradclip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> gradclip.clip_grad_norm_([weight], max_norm=1.0)
    tensor(5., dtype=torch.float64)
    >>> weight.grad
    tensor([0.6000, 0.8000])

    Args:
        parameters: A tensor or an iterable of tensors, read once. Tensors without a gradient are
            ignored; a gradient that occurs twice counts once.
        max_norm: The threshold, a number >= 0; inf to measure and write nothing.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.
        error_if_nonfinite: Raise an error if the norm is NaN or infinite. Host sync.
        foreach: Accepted for compatibility with torch, without effect.

    Returns:
        The norm before clipping, 0-d, float64, on the device of the first gradient.

    Raises:
        ArgumentError: ``max_norm`` or ``norm_type`` is invalid.
        GradientError: A gradient has a dtype or layout that cannot be clipped. Nothing was written.
        NonFiniteGradientError: The norm is NaN or infinite, and ``error_if_nonfinite`` is true.
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = listed_parameters(parameters)
    return _clip_norm_(_gradients(listed), limit, order, error_if_nonfinite, **_across(listed))


def clip_gradients_(tensors: TensorOrTensors, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients given as plain tensors in place, to a joint norm of at most ``max_norm``.

    For the gradients of ``torch.func``, of ``torch.autograd.grad`` or of a hand-written formula.
    The same as `clip_grad_norm_`, applied to the tensors themselves instead of to their ``.grad``.

    Args:
        tensors: A tensor or an iterable of tensors, read once. A tensor that occurs twice counts
            once.
        max_norm: The threshold, a number >= 0; inf to measure and write nothing.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.

    Returns:
        The norm before clipping, 0-d, float64, on the device of the first gradient.

    Raises:
        ArgumentError: ``max_norm`` or ``norm_type`` is invalid.
        GradientError: A gradient has a dtype or layout that cannot be clipped. Nothing was written.
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = _listed(tensors)
    return _clip_norm_(listed, limit, order, False, **_across(listed))


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Bound every element of the gradients of parameters to [-clip_value, clip_value], in place.

    The name and signature of ``torch.nn.utils.clip_grad_value_``. A gradient without a larger
    element is not written; NaN stays NaN.

    Args:
        parameters: A tensor or an iterable of tensors, read once. Tensors without a gradient are
            ignored.
        clip_value: Bound of the magnitudes, a number >= 0.
        foreach: Accepted for compatibility with torch, without effect.

    Raises:
        ArgumentError: ``clip_value`` is invalid.
        GradientError: A gradient is complex, or has a dtype or layout that cannot be clipped.
            Nothing was written.
    """
    bound = checked_bound("clip_value", clip_value, infinite=True)
    _clip_value_(listed_gradients(parameters), bound)


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the joint norm of tensors.

    The name and signature of ``torch.nn.utils.get_total_norm``. Nothing is written. For DTensors
    the norm is that of the full tensors, and the call is collective.

    Args:
        tensors: A tensor or an iterable of tensors, read once. A tensor that occurs twice counts
            once.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.
        error_if_nonfinite: Raise an error if the norm is NaN or infinite. Host sync.
        foreach: Accepted for compatibility with torch, without effect.

    Returns:
        The norm, 0-d, float64, on the device of the first tensor.

    Raises:
        ArgumentError: ``norm_type`` is invalid.
        GradientError: A tensor has a dtype or layout that cannot be measured.
        NonFiniteGradientError: The norm is NaN or infinite, and ``error_if_nonfinite`` is true.
    """
    order = checked_order(norm_type)
    listed = _listed(tensors)
    if error_if_nonfinite:
        # The compiler drops an operator that writes nothing and whose result is unused, and its
        # error with it. This one says that it writes.
        return _clip_norm_(listed, math.inf, order, True, **_across(listed))
    return _total_norm(listed, order, **_across(listed))


def clip_grads_with_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients of parameters by ``min(1, max_norm / total_norm)``, in place.

    The name and signature of ``torch.nn.utils.clip_grads_with_norm_``. If the norm is NaN or
    infinite, the gradients stay unchanged.

    Args:
        parameters: A tensor or an iterable of tensors, read once. Tensors without a gradient are
            ignored.
        max_norm: The threshold, a number >= 0, or inf.
        total_norm: The norm that `get_total_norm` returned, a tensor of one element.
        foreach: Accepted for compatibility with torch, without effect.

    Raises:
        ArgumentError: ``max_norm`` or ``total_norm`` is invalid.
        GradientError: A gradient has a dtype or layout that cannot be clipped. Nothing was written.
    """
    limit = checked_bound("max_norm", max_norm, infinite=True)
    if not isinstance(total_norm, Tensor) or total_norm.numel() != 1:
        raise ArgumentError(
            f"total_norm is {total_norm!r}: give the tensor of one element that get_total_norm() "
            "returned."
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
    """Clip and return the norm; see `clip_grad_norm_`. ``finite`` asks for the error."""
    engine, usual = engine_for("auto", CPU), TensorList(gradients)
    usable = not groups and not finite and engine.prepare(usual, order)
    if usable and host_may_read(usual[0]):
        return engine.host_clip_(usual, limit, order)
    buckets = buckets_of(distinct(gradients), order)
    norm = norms_of(buckets, order, scalar=True, groups=groups)
    if finite and not bool(norm.isfinite()):
        raise NonFiniteGradientError(
            f"The norm of the gradients is {norm.item()}: it must be finite with "
            "error_if_nonfinite=True. The gradients are unchanged; error_if_nonfinite=False "
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
    buckets = buckets_of(gradients, math.inf)  # refuses unfit gradients before any is written
    if coalesce_(gradients):
        buckets = buckets_of(gradients, math.inf)
    for bucket in buckets:
        dtype = norm_dtype(bucket.device)
        bucket.clamp_("auto", torch.full((1,), bound, dtype=dtype, device=bucket.device))


def _scale_(buckets: list[Bucket], norm: Tensor, limit: float) -> None:
    if limit == math.inf or (host_may_read(norm) and norm.item() <= limit):
        return
    # In half precision, as torch returns norms, the quotient would be rounded.
    wide = norm.reshape(1).to(norm_dtype(norm.device))
    coefficients = clip_coefficients(wide, limit, erase=False)
    for bucket in buckets:
        bucket.scale_("auto", coefficients)


def _across(tensors: Sequence[Tensor]) -> dict[str, Sequence[RankGroup]]:
    """Return the rank groups of DTensors as a keyword argument, none without DTensors.

    The schema of an operator has no such argument: compiled code takes no DTensors here.
    """
    groups = () if torch.compiler.is_compiling() else groups_of(tensors)
    return {"groups": groups} if groups else {}


def _listed(tensors: TensorOrTensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def listed_parameters(parameters: TensorOrTensors) -> list[Tensor]:
    """Return parameters as a list, read once.

    Raises:
        GradientError: The iterable holds something else than tensors.
    """
    listed = _listed(parameters)
    # Over the few types first: this also runs in compiled code, and for thousands of parameters.
    for kind in {*map(type, listed)}:
        if not issubclass(kind, Tensor) and not all(isinstance(p, Tensor) for p in listed):
            raise GradientError(
                f"Found a {kind.__name__} among the parameters: give tensors only, as "
                "model.parameters() does."
            )
    return listed


def listed_gradients(parameters: TensorOrTensors) -> list[Tensor]:
    """Return the gradients of parameters, an object that several share as often as it occurs."""
    return _gradients(listed_parameters(parameters))


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [g for p in parameters for g in [p.grad] if g is not None]
