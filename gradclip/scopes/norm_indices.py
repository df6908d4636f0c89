"""Where the norms of gradients are among all norms, and how sums and coefficients travel there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..engines.base import INFINITY
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import AttachError

NOWHERE = -1
"""Index of the norm of a row that is in none."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The norms that the gradient of a parameter belongs to. Told apart by identity."""

    labels: Tensor
    """Indices of the norms, int64: shape (1,), or with ``rows`` one for each index of dimension 0,
    and `NOWHERE` for none."""
    rows: bool = False
    """Whether the indices of dimension 0 have norms of their own."""


Places = tuple[Place, ...]
"""The places of the gradients of one or several buckets, in their order."""


def gathered(power_sums: Tensor, order: float, places: Places, count: int) -> Tensor:
    """Return the power sums of norms from those of their parts. No host sync.

    Args:
        power_sums: One for each label of the places, in their order.
        order: p of the p-norm, positive or infinity.
        places: Where the sums belong.
        count: k, how many norms there are.

    Returns:
        Shape (k,), 0 for norms without a part; the very tensor where each has one, in order.
    """
    labels = _labels(places, power_sums.device)
    if not labels.in_order(count):
        # Sorted and added up label by label: in the same order every time, unlike atomic sums.
        sources, lengths = _segments(places, count, power_sums.device)
        keep_if_captured(sources, lengths)
        kind = "max" if order == INFINITY else "sum"
        power_sums = torch.segment_reduce(
            power_sums[sources], kind, lengths=lengths, initial=0, unsafe=True
        )
    return power_sums


@lru_cache(maxsize=16)
def owners(places: Places) -> Places:
    """Return places that bring what belongs to some norm to the gradient that it is of."""
    return tuple(
        Place(torch.where(place.labels == NOWHERE, NOWHERE, index), place.rows)
        for index, place in enumerate(places)
    )


def spread(values: Tensor, places: Places, otherwise: float) -> Tensor:
    """Give each gradient, or each of its rows, its entry of a vector over all norms.

    Args:
        values: Shape (k,), on the device of the gradients.
        places: Where the gradients belong.
        otherwise: What rows get that belong nowhere.

    Returns:
        One value for each label of the places, in their order.
    """
    labels = _labels(places, values.device)
    if labels.in_order(values.numel()):
        return values
    keep_if_captured(labels.indices)
    if not labels.complete:
        values = torch.cat([values, values.new_full((1,), otherwise)])
    return values[labels.indices]


def present(places: Places, count: int, device: torch.device) -> Tensor:
    """Tell which of k norms have a gradient behind them; shape (k,), bool."""
    flags = _present(places, count, device)
    keep_if_captured(flags)
    return flags


@dataclass(frozen=True, slots=True)
class _Labels:
    """The labels of some places one after the other."""

    indices: Tensor
    complete: bool
    """Whether every one belongs to some norm."""
    counting_up: bool
    """Whether they are 0, 1, 2, ..."""

    def in_order(self, count: int) -> bool:
        """Tell whether they are exactly the labels of ``count`` norms, in their order."""
        return self.counting_up and self.indices.numel() == count


@lru_cache(maxsize=16)
def _labels(places: Places, device: torch.device) -> _Labels:
    indices = _joined(places)
    complete = bool((indices != NOWHERE).all())
    counting_up = bool((indices == torch.arange(indices.numel(), device="cpu")).all())
    return _Labels(_sent(indices, device), complete, counting_up)


@lru_cache(maxsize=16)
def _segments(places: Places, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which sums to take, sorted by label, and how many there are of each label."""
    indices = _joined(places)
    sources = indices.argsort(stable=True)[int((indices == NOWHERE).sum()) :]
    lengths = torch.bincount(indices[sources], minlength=count)
    return _sent(sources, device), _sent(lengths, device)


@lru_cache(maxsize=16)
def _present(places: Places, count: int, device: torch.device) -> Tensor:
    flags = torch.zeros(count + 1, dtype=torch.bool, device="cpu")
    flags[_joined(places)] = True  # the last one is that of rows that belong nowhere
    return _sent(flags[:count], device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    if capturing():
        raise AttachError(
            "Other parameters had gradients in the steps before the CUDA graph was captured than "
            "within, and where their norms are cannot be sent to the device now: capture a step "
            "like those before."
        )
    # CUDA keeps what it is still to copy from ordinary memory, so that nothing waits for it.
    return values.to(device, non_blocking=device.type == "cuda")


def _joined(places: Sequence[Place]) -> Tensor:
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.cat([none, *(place.labels.cpu() for place in places)])
