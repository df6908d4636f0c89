"""Norm indices: the norms that a gradient or its rows contribute to.

A *row* is a whole gradient, or one index of its dimension 0. Sums go from rows to norms
(`sums_by_norm`), coefficients from norms to rows (`row_values`). Where each row has a norm of its
own, in order, both return the very tensor: one gradient a norm is the usual case of scope
"parameter", and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..engines.base import CPU, INFINITY
from ..engines.cuda_graphs import capturing, keep_if_captured
from ..errors import AttachError

NOWHERE = -1
"""Norm index of a row that is in no norm."""


# Compared by identity, which is what lets a tuple of these be the key of the caches below.
@dataclass(frozen=True, slots=True, eq=False)
class NormIndices:
    """The norms that the gradient of one parameter belongs to. Compared by identity."""

    indices: Tensor
    """int64: shape (1,), or with ``rows`` one norm index for each index of dimension 0, `NOWHERE`
    for a row in no norm."""
    rows: bool = False
    """True if each index of dimension 0 has a norm of its own."""


def index_tensor(indices: Sequence[int]) -> Tensor:
    """Return indices as a tensor on the CPU, int64.

    Whatever torch.set_default_device says, as they are copied later. And with values in a
    FakeTensorMode, since they say which gradients share a norm.
    """
    with _disable_current_modes():
        return torch.tensor(indices, dtype=torch.int64, device="cpu")


def sums_by_norm(
    power_sums: Tensor, order: float, norm_indices: tuple[NormIndices, ...], count: int
) -> Tensor:
    """Add up the power sums of gradients or rows that share a norm. No host sync.

    Args:
        power_sums: One for each index in ``norm_indices``, in their order.
        order: p of the p-norm, positive or infinity.
        norm_indices: The norms that the sums belong to.
        count: k, the number of norms.

    Returns:
        Shape (k,), 0 for norms without a gradient; ``power_sums`` itself where it holds one sum
        for each norm, in order.
    """
    joined = _joined_on(norm_indices, power_sums.device)
    if not joined.is_range(count):
        # Sorted and added up norm by norm: in the same order every time, unlike atomic sums.
        sources, lengths = _segments(norm_indices, count, power_sums.device)
        keep_if_captured(sources, lengths)
        kind = "max" if order == INFINITY else "sum"
        power_sums = torch.segment_reduce(
            power_sums[sources], kind, lengths=lengths, initial=0, unsafe=True
        )
    return power_sums


@lru_cache(maxsize=16)
def gradient_indices(norm_indices: tuple[NormIndices, ...]) -> tuple[NormIndices, ...]:
    """Return indices with which `sums_by_norm` gives one sum for each gradient, not each norm.

    Rows in no norm stay out of the sum of their gradient.
    """
    return tuple(
        NormIndices(torch.where(item.indices == NOWHERE, NOWHERE, position), item.rows)
        for position, item in enumerate(norm_indices)
    )


def row_values(values: Tensor, norm_indices: tuple[NormIndices, ...], otherwise: float) -> Tensor:
    """Return for each gradient, or each of its rows, the value of its norm. No host sync.

    Args:
        values: Shape (k,), one value for each norm, on the device of the gradients.
        norm_indices: The norms that the gradients belong to.
        otherwise: The value for rows in no norm.

    Returns:
        One value for each index in ``norm_indices``, in their order; ``values`` itself where that
        is the same.
    """
    joined = _joined_on(norm_indices, values.device)
    if joined.is_range(values.numel()):
        return values
    keep_if_captured(joined.indices)
    if not joined.complete:
        values = torch.cat([values, values.new_full((1,), otherwise)])  # where NOWHERE, -1, points
    return values[joined.indices]


def present_norms(
    norm_indices: tuple[NormIndices, ...], count: int, device: torch.device
) -> Tensor:
    """Return which of k norms have a gradient; shape (k,), bool."""
    flags, _ = _presence(norm_indices, count, device)
    keep_if_captured(flags)
    return flags


def all_present(norm_indices: tuple[NormIndices, ...], count: int, device: torch.device) -> bool:
    """Return whether each of k norms has a gradient. No host sync."""
    return _presence(norm_indices, count, device)[1]


def are_separate(norm_indices: tuple[NormIndices, ...], count: int) -> bool:
    """Return whether each row has one of k norms to itself, in their order."""
    return _joined_on(norm_indices, CPU).is_range(count)


@dataclass(frozen=True, slots=True)
class _Joined:
    """The norm indices of several gradients, one after the other."""

    indices: Tensor
    complete: bool
    """True if each row belongs to a norm."""
    counts_up: bool
    """True if they are 0, 1, 2, ..."""

    def is_range(self, count: int) -> bool:
        """Return whether they are 0, 1, ..., count - 1: one row for each norm, in order."""
        return self.counts_up and self.indices.numel() == count


# A step asks for the same few tuples as the step before. Computed on the CPU and copied once, they
# cost no host sync at later steps, and a captured CUDA graph finds them in the same memory.


@lru_cache(maxsize=16)
def _joined_on(norm_indices: tuple[NormIndices, ...], device: torch.device) -> _Joined:
    indices = _joined(norm_indices)
    complete = bool((indices != NOWHERE).all())
    counts_up = bool((indices == torch.arange(indices.numel(), device="cpu")).all())
    return _Joined(_copied(indices, device), complete, counts_up)


@lru_cache(maxsize=16)
def _segments(
    norm_indices: tuple[NormIndices, ...], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the positions of the sums, sorted by norm, and the number of sums of each norm."""
    indices = _joined(norm_indices)
    # NOWHERE is below every index, so rows in no norm come first and are cut off. A stable sort
    # keeps the order of summation, and with it the bits.
    sources = indices.argsort(stable=True)[int((indices == NOWHERE).sum()) :]
    lengths = torch.bincount(indices[sources], minlength=count)
    return _copied(sources, device), _copied(lengths, device)


@lru_cache(maxsize=16)
def _presence(
    norm_indices: tuple[NormIndices, ...], count: int, device: torch.device
) -> tuple[Tensor, bool]:
    flags = torch.zeros(count + 1, dtype=torch.bool, device="cpu")
    flags[_joined(norm_indices)] = True  # NOWHERE, -1, sets the last one, which is cut off
    return _copied(flags[:count], device), bool(flags[:count].all())


def _copied(values: Tensor, device: torch.device) -> Tensor:
    if capturing():
        raise AttachError(
            "Other parameters had gradients in the steps before the CUDA graph was captured than "
            "within, and the indices of their norms cannot be copied to the device now: capture a "
            "step like those before."
        )
    # CUDA stages what it copies from pageable memory: the source may be freed, and nobody waits.
    return values.to(device, non_blocking=device.type == "cuda")


def _joined(norm_indices: Sequence[NormIndices]) -> Tensor:
    none = torch.empty(0, dtype=torch.int64, device="cpu")  # of no gradients, of the same dtype
    return torch.cat([none, *(item.indices.cpu() for item in norm_indices)])
