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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_bound, checked_order
from ..engines import engine_for
from ..engines.base import CPU, TensorList, host_may_read, lack_values, norm_dtype
from ..engines.no_grad import no_grad
from ..errors import ArgumentError, GradientError, NonFiniteGradientError
from ..gradients.buckets import Bucket, buckets_of
from ..gradients.coefficients import clip_coefficients
from ..gradients.differentiable import (
    clip_tracked_,
    joint_norm,
    refuse_graphs,
    require_grad,
    transformed,
    write_tracked_,
)
from ..gradients.forms import coalesce_, refuse_unordered
from ..gradients.held import distinct
from ..gradients.host_step import clip_parts_
from ..gradients.norms import norms_of
from ..ranks.groups import NormRanks, RankGroup
from ..ranks.shards import LOCAL_TYPES, groups_of, parts_in
from .arguments import (
    TensorOrTensors,
    listed_gradients,
    listed_parameters,
    listed_tensors,
    refuse_parameters,
)
from .operators import norm_like, nothing, operator


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
    <!-- test: tests/behaviour/functions/test_torch_names.py; tests/ranks/test_functions.py -->

    Examples:
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

    <!-- test: tests/behaviour/functions/test_torch_names.py -k refused;
    tests/behaviour/functions/test_arguments.py -->
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = listed_parameters(parameters)
    gradients = listed_gradients(listed)
    clip_ = _clip_graphs_ if require_grad(gradients) else _clip_norm_
    return clip_(gradients, limit, order, error_if_nonfinite, **_across(listed))


def clip_gradients_(tensors: TensorOrTensors, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale gradients given as plain tensors in place, to a joint norm of at most ``max_norm``.

    For the gradients of ``torch.func``, of ``torch.autograd.grad`` or of a hand-written formula.
    The same as `clip_grad_norm_`, applied to the tensors themselves instead of to their ``.grad``.
    <!-- test: tests/behaviour/functions/test_torch_names.py -k plain;
    tests/behaviour/functions/test_arguments.py -->

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
    listed = listed_tensors(tensors)
    tracked = require_grad(listed)
    if tracked:
        refuse_parameters(listed)
    clip_ = _clip_graphs_ if tracked else _clip_norm_
    return clip_(listed, limit, order, False, **_across(listed))


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Bound every element of the gradients of parameters to [-clip_value, clip_value], in place.

    The name and signature of ``torch.nn.utils.clip_grad_value_``. A gradient without a larger
    element is not written; NaN stays NaN.
    <!-- test: tests/behaviour/functions/test_torch_names.py; tests/models/test_differential.py -->

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
    gradients = listed_gradients(listed_parameters(parameters))
    if require_grad(gradients):
        _clip_value_in_graphs_(gradients, bound)
    else:
        _clip_value_(gradients, bound)


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the joint norm of tensors.

    The name and signature of ``torch.nn.utils.get_total_norm``. Nothing is written. For DTensors
    the norm is that of the full tensors, and the call is collective.
    <!-- test: tests/behaviour/functions/test_torch_names.py; tests/ranks/test_functions.py
    -k norms -->

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
    listed = listed_tensors(tensors)
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
    <!-- test: tests/behaviour/functions/test_torch_names.py; tests/models/test_differential.py -->

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
    gradients = listed_gradients(listed_parameters(parameters))
    refuse_graphs(gradients, "clip_grads_with_norm_()")
    _clip_with_norm_(gradients, limit, total_norm)


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
    if transformed():
        return _clip_transformed_(gradients, limit, order, finite)
    if lack_values(gradients):
        return norm_like(gradients)
    parts = None if finite else parts_in(NormRanks(tuple(groups)), usual)
    if parts is not None and engine.prepare(parts.tensors, order):
        return clip_parts_(engine, parts, limit, order)
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


def _clip_graphs_(
    gradients: list[Tensor], limit: float, order: float, finite: bool, **across: Any
) -> Tensor:
    """Clip gradients that carry a graph, so that derivatives of them stay exact."""
    norm = _clip_norm_(gradients, math.inf, order, finite, **across)
    traced = torch.compiler.is_compiling() or transformed()
    if traced or not host_may_read(norm) or limit < norm.item() < math.inf:
        clip_tracked_(gradients, limit, order)
    return norm


@no_grad
def _clip_transformed_(gradients: list[Tensor], limit: float, order: float, finite: bool) -> Tensor:
    """Clip gradients in a transformation of ``torch.func``, where the host may read no value."""
    if finite:
        raise GradientError(
            "Found gradients in a transformation of torch.func and error_if_nonfinite=True, which "
            "reads their norm on the host: leave it out, and check the returned norm outside of "
            "the transformation."
        )
    norm = joint_norm(gradients, order)  # before the write
    if limit < math.inf:
        clip_tracked_(gradients, limit, order)
    return norm


@operator("total_norm(Tensor[] tensors, float order) -> Tensor", norm_like)
def _total_norm(tensors: list[Tensor], order: float, groups: Sequence[RankGroup] = ()) -> Tensor:
    if transformed():
        return joint_norm(tensors, order)
    if lack_values(tensors):
        return norm_like(tensors)
    return norms_of(buckets_of(distinct(tensors), order), order, scalar=True, groups=groups)


@operator("clip_with_norm_(Tensor(a!)[] gradients, float limit, Tensor norm) -> ()", nothing)
def _clip_with_norm_(gradients: list[Tensor], limit: float, norm: Tensor) -> None:
    if not lack_values(gradients):
        _scale_(buckets_of(distinct(gradients), 2.0), norm, limit)


@operator("clip_value_(Tensor(a!)[] gradients, float bound) -> ()", nothing)
def _clip_value_(gradients: list[Tensor], bound: float) -> None:
    if lack_values(gradients):
        return
    gradients = distinct(gradients)
    refuse_unordered(gradients)
    buckets = buckets_of(gradients, math.inf)  # refuses unfit gradients before any is written
    if coalesce_(gradients):
        buckets = buckets_of(gradients, math.inf)
    for bucket in buckets:
        dtype = norm_dtype(bucket.device)
        bucket.clamp_("auto", torch.full((1,), bound, dtype=dtype, device=bucket.device))


def _clip_value_in_graphs_(gradients: list[Tensor], bound: float) -> None:
    """Bound the elements of gradients that carry a graph, in which their derivative is then 0."""
    refuse_unordered(gradients)
    for gradient in distinct(gradients):
        largest = _total_norm([gradient], math.inf)
        if not host_may_read(largest) or not largest.item() <= bound:
            with torch.enable_grad():
                write_tracked_(gradient, gradient.clone().clamp(-bound, bound))


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
    if {*map(type, tensors)} <= LOCAL_TYPES or torch.compiler.is_compiling():
        return {}
    groups = groups_of(tensors)
    return {"groups": groups} if groups else {}
