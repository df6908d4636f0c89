"""The gradient on its way back through time: clipped at a tensor, measured at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import checked_bound, checked_order
from ..engines import norm_dtype
from ..engines.no_grad import untracked
from ..errors import ArgumentError, GradientError
from ..gradients.buckets import buckets_of
from ..gradients.coefficients import clip_coefficients
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
    step. Where those stretch it explodes, where they shrink it vanishes: Pascanu, Mikolov and
    Bengio, "On the difficulty of training recurrent neural networks" (2013), section 2. The norms
    show which it is, and how fast.

    Call it after the forward pass, with the outputs of the cell in the order of time, and read
    `TimeNorms.norms` after the backward pass. No host sync on a CUDA device. Gradients are only
    looked at; to clip them on their way there is `gradclip.clip_backward`.

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
        states: What the cell returned, one entry for each time step: a tensor of any shape, whose
            whole gradient has one norm, or several, as the pair of an LSTM, which share one.
        norm_type: p of the p-norm, positive or inf.
        grad_scaler: The ``GradScaler`` that scales the loss: norms are those of the loss itself.

    Returns:
        What the norms can be read from.

    Raises:
        ArgumentError: ``norm_type`` is no such number.
        GradientError: A state is no tensor, or has no gradient.
    """
    return TimeNorms([*states], checked_order(norm_type), grad_scaler)


class TimeNorms:
    """The norms of the gradients of the states of one forward pass; made by `through_time`."""

    def __init__(
        self, states: Sequence[State], order: float, grad_scaler: GradScaler | None
    ) -> None:
        listed = [[state] if isinstance(state, Tensor) else [*state] for state in states]
        for step, parts in enumerate(listed):
            _check(step, parts)
        self._order = order
        self._scaler = grad_scaler
        self._device = listed[0][0].device if listed else torch.device("cpu")
        self._found: list[dict[int, Tensor]] = [{} for _ in listed]
        for found, parts in zip(self._found, listed, strict=True):
            for place, part in enumerate(parts):
                part.register_hook(_remembering(found, place, order))

    def __len__(self) -> int:
        return len(self._found)

    @property
    def norms(self) -> Tensor:
        """Norms in the order of time, of the newest gradient that came to each.

        Shape (time steps,), float64 (float32 where the device has no float64), on the device of
        the first state; 0 where no gradient has come.
        """
        none = torch.zeros((), dtype=norm_dtype(self._device), device=self._device)
        norms = torch.stack([self._joint(found, none) for found in self._found] or [none])
        if self._scaler is not None:
            norms = norms / self._scaler.scale(torch.ones_like(none))
        return norms[: len(self)]

    def _joint(self, found: dict[int, Tensor], none: Tensor) -> Tensor:
        norms = [norm.to(none) for norm in found.values()]
        return torch.linalg.vector_norm(torch.stack(norms), self._order) if norms else none


def _remembering(found: dict[int, Tensor], place: int, order: float) -> object:
    @untracked
    def remember(gradient: Tensor) -> None:
        found[place] = get_total_norm([gradient], order)

    return remember


def _check(step: int, parts: Sequence[object]) -> None:
    for part in parts:
        if not isinstance(part, Tensor):
            raise GradientError(
                f"Found a {type(part).__name__} as the state of time step {step}: give tensors, or "
                "for each time step several tensors."
            )
        if not part.requires_grad:
            raise GradientError(
                f"The state of time step {step} does not require a gradient: call through_time() "
                "on what the cell returned, with gradient tracking on."
            )


def clip_backward(
    x: Tensor,
    max_norm: float | None = None,
    max_value: float | None = None,
    grad_scaler: GradScaler | None = None,
) -> Tensor:
    """Pass ``x`` on unchanged, and clip the gradient that flows back through it.

    Applied to the hidden state at every time step it clips through time, where gradients of
    recurrent networks explode: Graves, "Generating sequences with recurrent neural networks"
    (2013). Gradients that are not finite pass through as they are.

    Args:
        x: Any tensor.
        max_norm: Largest 2-norm of the gradient of the whole tensor; None for no limit.
        max_value: Largest magnitude of its elements, applied first; None for no limit.
        grad_scaler: The ``GradScaler`` that scaled the loss, since gradients that flow back
            under it are scaled: its scale is taken into account, without a host sync.

    Returns:
        A view of ``x``.

    Raises:
        ArgumentError: A limit is no number >= 0, or none is given.
        GradientError: ``x`` is complex and ``max_value`` is given.
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
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, max_norm: float, max_value: float, grad_scaler: GradScaler | None
    ) -> Tensor:
        ctx.options = max_norm, max_value, grad_scaler
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        max_norm, max_value, grad_scaler = ctx.options
        if max_value < math.inf:
            refuse_unordered([gradient])
        # Others may hold this gradient too: what is written is a copy.
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
        return copy, None, None, None
