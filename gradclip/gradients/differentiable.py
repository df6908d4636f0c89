"""Clipping in operators that autograd follows, for gradients that carry a graph.

An engine writes by address, without a trace in the graph of a gradient: a derivative of the clipped
gradient would miss the coefficient, which depends on every element. Here norm, coefficient and
product are out of place and in float64, so that derivatives of any order are exact. The same
operators serve ``torch.func``, in whose transformations a tensor has neither an address nor a
value that the host can read.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..engines import norm_dtype
from ..engines.base import INFINITY
from ..errors import GradientError
from ..ranks.shards import is_dtensor
from .forms import forms_of
from .held import distinct

_REQUIRES_GRAD = attrgetter("requires_grad")


def require_grad(gradients: Sequence[Tensor]) -> bool:
    """Return whether a gradient may carry a graph, as ``create_graph=True`` makes it."""
    if torch.compiler.is_compiling():
        return any(gradient.requires_grad for gradient in gradients)
    try:
        # In C, which Dynamo cannot trace. A dual tensor has a tangent in place of a graph.
        return True in map(_REQUIRES_GRAD, gradients) or forward_ad._current_level >= 0
    except AttributeError:  # no tensor: refused later, with other gradients of a wrong type
        return False


def transformed() -> bool:
    """Return whether a transformation of ``torch.func`` runs, such as ``vmap``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def clipped(gradients: Sequence[Tensor], limit: float, order: float) -> tuple[list[Tensor], Tensor]:
    """Return clipped gradients as new tensors, and their norm before; see `clip_gradients`.

    Args:
        gradients: Dense tensors. Not written. An object that occurs twice counts once.
        limit: The threshold, a number >= 0, or infinity.
        order: p of the p-norm, positive or infinity.
    """
    norm = joint_norm(gradients, order)
    coefficient = _coefficient(norm, limit)
    # By object, so that one that was given twice is returned twice.
    products = {id(g): _product(g, coefficient) for g in distinct([*gradients])}
    return [products[id(gradient)] for gradient in gradients], norm


def joint_norm(gradients: Sequence[Tensor], order: float) -> Tensor:
    """Return the joint norm of dense gradients; 0-d, float64, on the device of the first one.

    Its derivative is 0 where the norm is 0, as the smallest subgradient is.
    """
    tensors = [_measured(gradient, order) for gradient in distinct([*gradients])]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = norm_dtype(device)
    elements = [tensor.to(device, dtype).reshape(-1) for tensor in tensors if tensor.numel()]
    if not elements:
        return torch.zeros((), dtype=dtype, device=device)
    together = torch.cat(elements)
    if order == INFINITY:
        return together.abs().amax()
    power_sum = _power_sum(together, order)
    # The root has no derivative at 0, nor where it is not finite: a derivative of 0 passes where()
    # only if the operators behind it see numbers at which theirs is finite.
    usable = (power_sum > 0) & (power_sum < INFINITY)
    inside = torch.where(usable, power_sum, 1.0)
    root = inside.sqrt() if order == 2 else inside.pow(1 / order)
    return torch.where(usable, root, power_sum.detach())


def clip_tracked_(gradients: Sequence[Tensor], limit: float, order: float) -> None:
    """Clip gradients in place and in their graph: what is derived from them later is exact.

    Raises:
        GradientError: A gradient cannot be written in its graph.
    """
    listed = distinct([*gradients])
    with torch.enable_grad():
        # Of copies, since the graph keeps what it was computed from.
        products, _norm = clipped([*map(Tensor.clone, listed)], limit, order)
        for gradient, product in zip(listed, products, strict=True):
            write_tracked_(gradient, product)


def scale_tracked_(gradients: Sequence[Tensor], coefficient: Tensor | float, order: float) -> None:
    """Scale gradients that share one norm, in place and in their graph.

    As `clip_tracked_`: the coefficient is that of a constant threshold, and changes with the norm.

    Args:
        gradients: Distinct gradients.
        coefficient: Its value, in [0, 1]; a number or one element.
        order: p of their norm.

    Raises:
        GradientError: A gradient cannot be written in its graph.
    """
    with torch.enable_grad():
        copies = [*map(Tensor.clone, gradients)]
        norm = joint_norm(copies, order)
        positive = (norm > 0) & (norm < INFINITY)
        ratio = torch.where(positive, norm.detach() / torch.where(positive, norm, 1.0), 1.0)
        value = torch.as_tensor(coefficient, dtype=norm.dtype, device=norm.device).reshape(())
        for gradient, copy in zip(gradients, copies, strict=True):
            product = _product(copy, ratio * value)
            # Of gradients that are erased the product with 0 may be NaN.
            erased = value.to(gradient.device) == 0
            write_tracked_(gradient, torch.where(erased, torch.zeros_like(copy), product))


def refuse_graphs(gradients: Sequence[Tensor], name: str) -> None:
    """Refuse gradients that carry a graph, in which factors would be written that it leaves out.

    Args:
        gradients: The gradients.
        name: What would write the factors.

    Raises:
        GradientError: A gradient requires a gradient.
    """
    if require_grad(gradients):
        raise GradientError(
            f"Found a gradient with a graph, as create_graph=True makes it, in which {name} would "
            "write a factor that derivatives leave out: clip out of place with "
            "gradclip.clip_gradients(tensors, max_norm), or detach() the gradients."
        )


def write_tracked_(gradient: Tensor, values: Tensor) -> None:
    """Write values to a gradient, whose graph is then theirs. Gradient tracking is on.

    Raises:
        GradientError: Autograd refuses it, as for one of several views, or ``vmap`` for a tensor
            that all of its examples share.
    """
    try:
        # A leaf that requires a gradient has no graph, and autograd would refuse the write.
        own = gradient.is_leaf and gradient.requires_grad
        (gradient.detach() if own else gradient).copy_(values)
    except RuntimeError as error:
        raise GradientError(
            f"Found a gradient that cannot be written in place ({error}): clip out of place with "
            "gradclip.clip_gradients(tensors, max_norm), whose results can be differentiated."
        ) from error


def _measured(gradient: Tensor, order: float) -> Tensor:
    """Return a real tensor of the same norm; the formula of a derivative needs dense ones."""
    if isinstance(gradient, Tensor) and (gradient.is_sparse or is_dtensor(gradient)):
        kind = "DTensor" if is_dtensor(gradient) else "sparse gradient"
        raise GradientError(
            f"Found a {kind} that is to be clipped in its graph, which is done for dense tensors "
            "of one process: give its full_tensor() or to_dense()."
        )
    return forms_of(gradient, order)[0]


def _power_sum(elements: Tensor, order: float) -> Tensor:
    if order % 2 == 0:
        return elements.pow(order).sum()
    # The derivatives of |x|**p at 0 are infinite from some order on: those of the smallest
    # subgradient are 0. Elements of 0 are therefore left out of the power.
    zero = elements == 0
    powers = torch.where(zero, 1.0, elements.abs()).pow(order)
    return torch.where(zero, 0.0, powers).sum()


def _coefficient(norm: Tensor, limit: float) -> Tensor:
    """Return ``min(1, limit / norm)``, and 1 for a norm that is not finite; 0-d."""
    finite = norm < INFINITY
    if limit == 0:  # gradients of 0 as well: whatever changes them, the clipped one stays 0
        return torch.where(finite, 0.0, torch.ones_like(norm))
    exceeding = finite & (norm > limit)
    return torch.where(exceeding, limit / torch.where(exceeding, norm, 1.0), 1.0)


def _product(gradient: Tensor, coefficient: Tensor) -> Tensor:
    """Return the product, computed in float64 and rounded once, in memory of its own."""
    wide = torch.promote_types(gradient.dtype, coefficient.dtype)
    return (gradient.to(wide) * coefficient.to(gradient.device)).to(gradient.dtype)
