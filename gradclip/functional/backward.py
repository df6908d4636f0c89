"""Functions that clip or measure the gradient of a tensor while ``backward()`` runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import checked_bound, checked_order
from ..engines import norm_dtype
from ..engines.no_grad import no_grad
from ..errors import ArgumentError, GradientError
from ..gradients.buckets import buckets_of
from ..gradients.coefficients import clip_coefficients
from ..gradients.differentiable import clipped, joint_norm, transformed
from ..gradients.forms import refuse_unordered
from ..gradients.norms import norms_of
from .torch_names import get_total_norm

if TYPE_CHECKING:
    from torch.amp import GradScaler

State: TypeAlias = Tensor | Sequence[Tensor]


def through_time(
    states: Iterable[State], norm_type: float = 2.0, grad_scaler: GradScaler | None = None
) -> TimeNorms:
    """Record the norm of the gradient of a recurrent state at every time step.

    Backpropagation through time multiplies the gradient of a state by the Jacobian of every later
    step. Jacobians that stretch let it explode, those that shrink let it vanish (Pascanu, Mikolov
    and Bengio, "On the difficulty of training recurrent neural networks", 2013, section 2). The
    norms show which of the two happens, and how fast.
    <!-- test: tests/behaviour/functions/test_backward_pass.py -k linear_state;
    tests/docs/test_examples.py -k through_time -->

    Call this after the forward pass, with the outputs of the cell in the order of time, and read
    `TimeNorms.norms` after the backward pass. Gradients are not written; `gradclip.clip_backward`
    clips them during the backward pass. No host sync on a CUDA device.
    <!-- test: tests/behaviour/functions/test_backward_pass.py;
    tests/behaviour/devices/test_waiting.py -k functions -->

    Examples:
        >>> import torch, gradclip
        >>> cell = torch.nn.RNNCell(1, 1)
        >>> _ = torch.nn.init.constant_(cell.weight_hh, 0.5), torch.nn.init.zeros_(cell.bias_hh)
        >>> _ = torch.nn.init.zeros_(cell.weight_ih), torch.nn.init.zeros_(cell.bias_ih)
        >>> state, states = torch.zeros(1, 1), []
        >>> for _ in range(4):
        ...     state = cell(torch.zeros(1, 1), state)
        ...     states.append(state)
        >>> watched = gradclip.through_time(states)
        >>> state.sum().backward()
        >>> watched.norms.tolist()
        [0.125, 0.25, 0.5, 1.0]

    Args:
        states: The outputs of the cell, one for each time step: a tensor of any shape, whose
            whole gradient has one norm, or several tensors, such as the pair of an LSTM, which
            share one norm.
        norm_type: p of the p-norm, a number > 0, or inf for the largest element.
        grad_scaler: The ``GradScaler`` that scales the loss; its scale is divided out.

    Returns:
        An object from which the norms can be read.

    Raises:
        ArgumentError: ``norm_type`` is invalid.
        GradientError: A state is not a tensor, or does not require a gradient.
    """
    return TimeNorms([*states], checked_order(norm_type), grad_scaler)


class TimeNorms:
    """Norms of the gradients of the states of one forward pass; made by `through_time`.

    <!-- test: tests/behaviour/functions/test_backward_pass.py -k each_state -->
    """

    def __init__(
        self, states: Sequence[State], order: float, grad_scaler: GradScaler | None
    ) -> None:
        tensors = [[state] if isinstance(state, Tensor) else [*state] for state in states]
        for step, state in enumerate(tensors):
            _check(step, state)
        self._order = order
        self._scaler = grad_scaler
        self._device = tensors[0][0].device if tensors else torch.device("cpu")
        # For each time step, the norm of each tensor of the state that a gradient has reached.
        self._norms: list[dict[int, Tensor]] = [{} for _ in tensors]
        for norms, state in zip(self._norms, tensors, strict=True):
            for index, tensor in enumerate(state):
                tensor.register_hook(_measuring(norms, index, order))

    def __len__(self) -> int:
        return len(self._norms)

    @property
    def norms(self) -> Tensor:
        """Norms of the gradients of the newest backward pass, in the order of time.

        Shape (time steps,), float64 (float32 if the device has no float64), on the device of the
        first state; 0 for a state that no gradient has reached.
        <!-- test: tests/behaviour/functions/test_backward_pass.py -k 'newest or each_state' -->
        """
        zero = torch.zeros((), dtype=norm_dtype(self._device), device=self._device)
        norms = torch.stack([self._joint(by_tensor, zero) for by_tensor in self._norms] or [zero])
        if self._scaler is not None:
            # The scale, by a method that neither reads it on the host nor needs a first step.
            norms = norms / self._scaler.scale(torch.ones_like(zero))
        return norms[: len(self)]

    def _joint(self, by_tensor: dict[int, Tensor], zero: Tensor) -> Tensor:
        norms = [norm.to(zero) for norm in by_tensor.values()]
        return torch.linalg.vector_norm(torch.stack(norms), self._order) if norms else zero


def _measuring(norms: dict[int, Tensor], index: int, order: float) -> object:
    """Return a tensor hook that measures the gradient and returns nothing, which leaves it."""

    @no_grad
    def measure(gradient: Tensor) -> None:
        norms[index] = get_total_norm([gradient], order)

    return measure


def _check(step: int, state: Sequence[object]) -> None:
    for tensor in state:
        if not isinstance(tensor, Tensor):
            raise GradientError(
                f"Found a {type(tensor).__name__} as the state of time step {step}: give a tensor "
                "or several tensors for each time step."
            )
        if not tensor.requires_grad:
            raise GradientError(
                f"The state of time step {step} does not require a gradient: call through_time() "
                "on the outputs of the cell, with gradient tracking on."
            )


def clip_backward(
    x: Tensor,
    max_norm: float | None = None,
    max_value: float | None = None,
    grad_scaler: GradScaler | None = None,
) -> Tensor:
    """Return ``x`` unchanged, and clip the gradient that flows back through it.

    Applied to the hidden state at every time step, it clips through time, where the gradients of
    recurrent networks explode (Graves, "Generating sequences with recurrent neural networks",
    2013). A gradient whose norm is NaN or infinite passes unchanged. No host sync on a CUDA device.
    <!-- test: tests/behaviour/functions/test_backward_pass.py -->

    Args:
        x: Any tensor.
        max_norm: Threshold of the 2-norm of the gradient of the whole tensor, a finite number
            >= 0; None for no threshold.
        max_value: Bound of the magnitude of its elements, a finite number >= 0, applied before the
            norm is clipped; None for no bound.
        grad_scaler: The ``GradScaler`` that scales the loss. Gradients that flow back are scaled,
            and so threshold and bound are scaled alike.

    Returns:
        A view of ``x``.

    Raises:
        ArgumentError: A number is invalid, or neither is given.
        GradientError: ``x`` is complex and ``max_value`` is given.

    <!-- test: tests/behaviour/functions/test_backward_pass.py -k refused -->
    """
    if max_norm is None and max_value is None:
        raise ArgumentError("Neither max_norm nor max_value is given: give at least one of them.")
    limit = math.inf if max_norm is None else checked_bound("max_norm", max_norm)
    bound = math.inf if max_value is None else checked_bound("max_value", max_value)
    if max_value is not None:
        refuse_unordered([x])
    clipped: Tensor = _ClipBackward.apply(x, limit, bound, grad_scaler)  # type: ignore[no-untyped-call]
    return clipped


class _ClipBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, max_norm: float, max_value: float, grad_scaler: GradScaler | None
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[1:]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    @once_differentiable  # the second derivative would flow back through x and be clipped as well
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.options[1] < math.inf:
            refuse_unordered([gradient])
        clip = _out_of_place if transformed() else _in_copy
        return clip(gradient, *ctx.options), None, None, None


def _in_copy(
    gradient: Tensor, max_norm: float, max_value: float, grad_scaler: GradScaler | None
) -> Tensor:
    """Return the clipped gradient, a copy that engines have written."""
    # Other nodes of the graph may hold this gradient: the copy is written. Contiguous, because
    # an expanded gradient shares memory between its elements.
    copy = gradient.clone(memory_format=torch.contiguous_format)
    [bucket] = buckets_of([copy], 2.0)
    norms = norms_of([bucket], 2.0)
    limit, bound = torch.full_like(norms, max_norm), torch.full_like(norms, max_value)
    if grad_scaler is not None:
        limit, bound = grad_scaler.scale([limit, bound])
    if max_value < math.inf:
        bounds = torch.where(norms < math.inf, bound, math.inf)
        bucket.clamp_("auto", bounds)
        norms = norms_of([bucket], 2.0)
    coefficients = clip_coefficients(norms, limit, erase=False)
    bucket.scale_("auto", coefficients)
    return copy


def _out_of_place(
    gradient: Tensor, max_norm: float, max_value: float, grad_scaler: GradScaler | None
) -> Tensor:
    """Return the clipped gradient, in a transformation of ``torch.func``."""
    _refuse_second_derivative()
    wide = gradient.to(torch.promote_types(gradient.dtype, norm_dtype(gradient.device)))
    scale = torch.ones((), dtype=norm_dtype(gradient.device), device=gradient.device)
    if grad_scaler is not None:
        scale = grad_scaler.scale(scale)
    unscaled = wide / scale
    if max_value < math.inf:
        finite = joint_norm([unscaled], 2.0).detach() < math.inf
        unscaled = torch.where(finite, unscaled.clamp(-max_value, max_value), unscaled)
    [result], _norm = clipped([unscaled], max_norm, 2.0)
    return (result * scale).to(gradient.dtype)


def _refuse_second_derivative() -> None:
    """Refuse nested derivatives, which torch cannot mark as differentiable once.

    Raises:
        GradientError: Two transformations that differentiate are running.
    """
    keys = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    if keys.count(torch._C._functorch.TransformType.Grad) > 1:
        raise GradientError(
            "Found a second derivative of torch.func through clip_backward(), which would be "
            "clipped on its way as well: clip the gradient with gradclip.clip_gradients() instead."
        )
