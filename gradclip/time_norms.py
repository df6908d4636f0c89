"""How the gradient of a recurrent network's state grows on its way back through time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .checks import checked_order
from .engines import norm_dtype
from .engines.no_grad import untracked
from .errors import GradientError
from .functional import get_total_norm

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
