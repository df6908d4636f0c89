"""Adaptive gradient clipping: the gradient of each unit relative to the norm of its weights."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..checks import checked_order, checked_positive
from ..engines import engine_for
from ..engines.base import RelativeLimit, TensorList, lack_values
from ..gradients.buckets import buckets_of
from ..gradients.coefficients import clip_coefficients
from ..gradients.differentiable import refuse_graphs
from ..gradients.norms import norms_of
from ..scopes.norm_indices import NormIndices, present_norms
from ..thresholds import RelativeToWeights, StepContext
from .arguments import TensorOrTensors, listed_gradients, listed_parameters
from .operators import norm_like, operator


def clip_grad_units_(
    parameters: TensorOrTensors,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float = 2.0,
) -> Tensor:
    """Scale the gradient of each unit in place, relative to the norm of the unit's weights.

    Adaptive gradient clipping (AGC). A unit is a row of a matrix, a filter of a convolution or a
    whole bias. The threshold of its gradient is ``clip_factor * max(norm of its weights, eps)``
    (Brock, De, Smith and Simonyan, "High-performance large-scale image recognition without
    normalization", 2021, https://arxiv.org/abs/2102.06171). The paper does not clip the last
    linear layer: pass the parameters of all other layers.
    <!-- test: tests/behaviour/functions/test_units.py -k weights -->

    A unit whose norm is NaN or infinite stays unchanged. No host sync on a CUDA device, unless
    gradients lie on several devices. For DTensors the call is collective. To clip and log at every
    step of an optimizer, give `GradientClipper` the scope "unit" and
    `gradclip.thresholds.RelativeToWeights`.
    <!-- test: tests/behaviour/functions/test_units.py; tests/ranks/test_functions.py -k units -->

    Examples:
        >>> import torch, gradclip
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
        >>> weight.grad = torch.tensor([[0.03, 0.0], [0.03, 0.0]])
        >>> norm = gradclip.clip_grad_units_([weight])
        >>> weight.grad
        tensor([[0.0300, 0.0000],
                [0.0050, 0.0000]])

    Args:
        parameters: A tensor or an iterable of tensors, read once. Tensors without a gradient are
            ignored; a gradient that occurs twice counts once.
        clip_factor: Largest ratio of a gradient's norm to its weights' norm, a number > 0.
        eps: Lower bound of a weights' norm, a number > 0, so that weights of zero can learn.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.

    Returns:
        The joint norm of all gradients before clipping, 0-d, float64, on the device of the first
        gradient.

    Raises:
        ArgumentError: ``clip_factor``, ``eps`` or ``norm_type`` is invalid.
        GradientError: A gradient has a dtype or layout that cannot be clipped. Nothing was written.
    """
    order, factor = checked_order(norm_type), checked_positive("clip_factor", clip_factor)
    eps = checked_positive("eps", eps)
    listed = listed_parameters(parameters)
    gradients = listed_gradients(listed)
    refuse_graphs(gradients, "clip_grad_units_()")
    weights = [p for p in listed if p.grad is not None]
    return _clip_units_(gradients, weights, factor, eps, order)


@operator(
    "clip_units_(Tensor(a!)[] gradients, Tensor[] weights, float factor, float eps, float order)"
    " -> Tensor",
    norm_like,
)
def _clip_units_(
    gradients: list[Tensor], weights: list[Tensor], factor: float, eps: float, order: float
) -> Tensor:
    norms = _norms_of_plain_units_(gradients, weights, factor, eps, order)
    if norms is None:
        if lack_values(gradients):
            return norm_like(gradients)
        norms = _norms_of_units_(gradients, weights, factor, eps, order)
    return torch.linalg.vector_norm(norms, order)  # type: ignore[no-any-return]


def _norms_of_plain_units_(
    gradients: list[Tensor], weights: list[Tensor], factor: float, eps: float, order: float
) -> Tensor | None:
    """Clip in one pass if the gradients are plain and their engine makes it; else return None."""
    if not gradients:
        return None
    engine = engine_for("auto", gradients[0].device)
    units, tensors = TensorList(gradients), TensorList(weights)
    if not engine.prepare_rows(units, tensors, order, rows=True):
        return None
    limit = RelativeLimit(factor, eps)
    return engine.clip_rows_(units, tensors, order, limit, erase=False, write=True)[0]


def _norms_of_units_(
    gradients: list[Tensor], weights: list[Tensor], factor: float, eps: float, order: float
) -> Tensor:
    """Clip gradients of any kind and return the norms of their units before, shape (units,)."""
    # Each gradient once, with the last weight that has it.
    pairs = {id(g): (g, w.data) for g, w in zip(gradients, weights, strict=True)}
    gradients = [gradient for gradient, _ in pairs.values()]
    norm_indices, count = _unit_norm_indices(tuple(gradient.shape for gradient in gradients))
    buckets = buckets_of(gradients, order, norm_indices)
    norms = norms_of(buckets, order, count=count)
    weight_buckets = buckets_of([weight for _, weight in pairs.values()], order, norm_indices)
    weight_norms = norms_of(weight_buckets, order, count=count, device=norms.device)
    context = StepContext(0, present_norms(norm_indices, count, norms.device), order, weight_norms)
    thresholds = RelativeToWeights(factor, eps).thresholds(norms, context)
    coefficients = clip_coefficients(norms, thresholds, erase=False)
    for bucket in buckets:
        bucket.scale_("auto", coefficients)
    return norms


@lru_cache(maxsize=16)
def _unit_norm_indices(shapes: tuple[torch.Size, ...]) -> tuple[tuple[NormIndices, ...], int]:
    """Return the norm indices of tensors of these shapes, a norm for each unit, and the count."""
    norm_indices, count = [], 0
    for shape in shapes:
        rows = len(shape) > 1
        units = shape[0] if rows else 1
        norm_indices.append(NormIndices(torch.arange(count, count + units, device="cpu"), rows))
        count += units
    return tuple(norm_indices), count
