"""The check of a loss that a training loop assigns or a closure returns.

On the CPU a loss becomes a number. On another device it stays a tensor, which the host does not
read within the step.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..engines.base import host_may_read
from ..engines.cuda_graphs import capturing
from ..errors import ArgumentError, AttachError
from ..ranks.shards import is_dtensor


def checked_loss(loss: object) -> float | Tensor:
    """Return a loss that no later change of the given one alters. No host sync.

    Returns:
        A number; or a 0-d tensor, detached, if the loss is on a device that the host cannot read.

    Raises:
        ArgumentError: It is neither a number nor a tensor of one real element.
        AttachError: A CUDA graph is captured, whose replays would repeat a number of the host.
    """
    if isinstance(loss, Tensor):
        _check_tensor(loss)
        if not host_may_read(loss):
            # A copy: a training loop may reuse the memory for the loss of its next step.
            return loss.detach().to(norm_dtype(loss.device), copy=True).reshape(())
        loss = loss.detach().item()
    # bool is a subclass of int, and numpy's numbers are registered as Real.
    if type(loss) is not float and (isinstance(loss, bool) or not isinstance(loss, Real)):
        raise ArgumentError(
            f"loss is {loss!r:.200} of type {type(loss).__name__}: give a number or a tensor of "
            "one element, or None for no loss."
        )
    if capturing():
        raise AttachError(
            f"The loss is a number on the host, {loss!r}, and a CUDA graph is being captured, "
            "whose replays would all log that number: give the loss as a tensor on the device, "
            "which the captured forward pass has computed."
        )
    return float(loss)


def _check_tensor(loss: Tensor) -> None:
    if is_dtensor(loss):
        raise ArgumentError(
            f"loss is a DTensor with the placements {loss.placements}: give its whole value on "
            "each rank, loss.full_tensor()."
        )
    dtype, shape = loss.dtype, tuple(loss.shape)
    if loss.numel() != 1 or loss.is_sparse:
        kind = "sparse tensor" if loss.is_sparse else "tensor"
        raise ArgumentError(
            f"loss is a {kind} of shape {shape}: give the one number of the step, such as "
            "loss.mean()."
        )
    if loss.is_complex() or dtype == torch.bool:
        raise ArgumentError(f"loss is a tensor of {dtype}: give a real number, such as loss.abs().")


def loss_or_none(given: object) -> float | Tensor | None:
    """Return a loss as `checked_loss`, None for all else: a closure may return what it likes."""
    try:
        return None if given is None else checked_loss(given)
    except ArgumentError:
        return None
