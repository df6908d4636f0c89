"""The mean of the losses of all ranks, which travels beside their norms in one collective.

Each rank contributes its loss and a 1, or zeros where it has no loss, as the stages of a pipeline
but the last. Sums of both make the mean over the ranks that gave one. The collective of an infinity
norm takes maxima and cannot add: there each rank has a place of its own for both numbers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor, distributed

from ..engines import norm_dtype
from ..engines.base import CPU, INFINITY
from ..errors import AttachError
from .groups import NormRanks, world_size

NO_LOSS = -math.inf
"""Stands for a missing loss where only the device knows that it is missing: across ranks of which
none gave one. It is above no limit, so a rule need not tell it from a low loss."""


def check_reach(rule: str, norm_ranks: NormRanks) -> None:
    """Refuse a rule that decides by the loss where some ranks would decide by another loss.

    Args:
        rule: The rule, for the error.
        norm_ranks: The ranks that the norms span, and with them the loss.

    Raises:
        AttachError: The norms do not span all ranks, and no ``ranks=`` says that this is right.

    Warns:
        UserWarning: ``ranks=`` does not span all ranks.
    """
    if reaches_all(norm_ranks):
        return
    reached, ranks = _reached(norm_ranks), world_size()
    found = (
        f"{rule} decides by the loss, which is averaged over {reached} of {ranks} ranks, so that "
        "ranks would decide differently"
    )
    if norm_ranks.across is None:
        raise AttachError(
            f'{found}: give ranks=Ranks(replicated="*") where each rank has the whole model, as '
            "with DistributedDataParallel, else Ranks with all ranks that train it. The step's "
            "collective then averages their losses."
        )
    warnings.warn(
        f"{found} if the others train the same model: give ranks= all that do.",
        UserWarning,
        stacklevel=6,
    )


def reaches_all(norm_ranks: NormRanks) -> bool:
    """Return whether the loss is averaged over all ranks that there are."""
    return _reached(norm_ranks) >= world_size()


def _reached(norm_ranks: NormRanks) -> int:
    """Return the number of ranks that the loss is averaged over."""
    groups = (norm_ranks.widest, norm_ranks.across)
    return math.prod(len(group.ranks) for group in groups if group is not None)


def numbers_per_loss(order: float) -> int:
    """Return how many numbers of a collective are for the losses."""
    return 2 * distributed.get_world_size() if order == INFINITY else 2


def loss_numbers(loss: float | Tensor | None, order: float, device: torch.device) -> Tensor:
    """Return the contribution of this rank; shape (n,), with n from `numbers_per_loss`.

    Args:
        loss: The loss of this rank, a number or 0-d, or None.
        order: p of the norms that the collective is for.
        device: The device of the collective's vector.
    """
    dtype = norm_dtype(device)
    if loss is None:
        own = torch.zeros(2, dtype=dtype, device=device)
    else:
        own = torch.ones(2, dtype=dtype, device=device)
        own[0] = loss  # copies or fills, where torch.tensor would wait for the device
    if order != INFINITY:
        return own
    ranks = distributed.get_world_size()
    # No maximum is below minus infinity, and a place is read only where its 1 is.
    numbers = torch.full((2, ranks), -INFINITY, dtype=dtype, device=device)
    numbers[:, distributed.get_rank()] = own
    return numbers.flatten()


def host_loss_numbers(loss: float | Tensor | None, order: float) -> list[float]:
    """Return the same numbers for a vector that the host makes."""
    if order == INFINITY:
        return loss_numbers(loss, order, CPU).tolist()
    return [0.0, 0.0] if loss is None else [float(loss), 1.0]


def sum_and_count(numbers: Tensor, order: float) -> Tensor:
    """Return the sum of the losses and the number of ranks that gave one; shape (2,).

    Args:
        numbers: What the collective has made of all contributions, shape (n,).
        order: p of the norms.
    """
    if order != INFINITY:
        return numbers
    losses, flags = numbers.reshape(2, -1)
    given = flags > 0
    return torch.stack((torch.where(given, losses, 0.0).sum(), given.sum()))


def mean_loss(shared: Tensor) -> Tensor:
    """Return the mean of a sum and a count, 0-d; `NO_LOSS` if no rank gave a loss."""
    total, count = shared
    return torch.where(count > 0, total / count, NO_LOSS)


def host_mean_loss(numbers: Sequence[float], order: float) -> float | None:
    """Return the mean as a number, of numbers as `sum_and_count` takes them; None for no loss."""
    if order == INFINITY:
        middle = len(numbers) // 2
        losses = [*compress(numbers[:middle], (flag > 0 for flag in numbers[middle:]))]
        numbers = sum(losses), len(losses)
    total, count = numbers
    return total / count if count else None
