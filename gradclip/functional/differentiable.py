"""`clip_gradients`: clipping out of place, whose results can be differentiated."""

from __future__ import annotations

from torch import Tensor

from ..checks import checked_bound, checked_order
from ..gradients.differentiable import clipped
from .arguments import TensorOrTensors, listed_tensors, refuse_parameters


def clip_gradients(
    tensors: TensorOrTensors, max_norm: float, norm_type: float = 2.0
) -> tuple[list[Tensor], Tensor]:
    """Return gradients scaled to a joint norm of at most ``max_norm``, as new tensors.

    The out-of-place form of `clip_gradients_`, for gradients that carry a graph: in the inner loop
    of meta-learning (Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of
    deep networks", 2017), the outer derivative passes through the clipped gradient and therefore
    through the coefficient ``min(1, max_norm / norm)``, which depends on every element. Derivatives
    of any order are exact: at most at the threshold the result is the gradient, with derivative 1;
    above it is ``max_norm * g / norm(g)``. Works in ``torch.func`` (``grad``, ``vmap``, ``jvp``).
    <!-- test: tests/behaviour/functions/test_differentiable.py -->

    Norm and product are computed in float64. The arguments are not written. No host sync. A
    gradient whose norm is NaN or infinite is returned as it is. Memory: two float64 copies of the
    gradients while the graph lives.
    <!-- test: tests/behaviour/functions/test_differentiable.py -k 'values or written';
    tests/behaviour/devices/test_waiting.py -k functions -->

    Examples:
        >>> import torch, gradclip
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> [gradient] = torch.autograd.grad((weight**2).sum(), weight, create_graph=True)
        >>> [clipped], norm = gradclip.clip_gradients(gradient, max_norm=1.0)
        >>> clipped.item(), norm.item()
        (1.0, 6.0)
        >>> torch.autograd.grad(clipped.sum(), weight)  # the sign of the gradient does not change
        (tensor([0.]),)

    Args:
        tensors: A dense tensor or an iterable of dense tensors, read once. A tensor that occurs
            twice counts once.
        max_norm: The threshold, a number >= 0; inf to measure only.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.

    Returns:
        New tensors with the shapes, dtypes and devices of the given ones, one for each; and their
        norm before clipping, 0-d, float64 (float32 if the device has no float64), on the device of
        the first one. Both can be differentiated.

    Raises:
        ArgumentError: ``max_norm`` or ``norm_type`` is invalid.
        GradientError: A tensor is sparse or a DTensor, has a dtype that cannot be clipped, or is a
            parameter that has a gradient.
    """
    limit, order = checked_bound("max_norm", max_norm, infinite=True), checked_order(norm_type)
    listed = listed_tensors(tensors)
    refuse_parameters(listed)
    return clipped(listed, limit, order)
