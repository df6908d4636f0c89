"""Norms of each label in ascending order, kept so as they come and go."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engines.base import host_may_read

_BLOCK = 2**16
"""Elements that the CPU reorders at once: a few times as fast as all of them through memory."""


class Ordered:
    """Rows of norms in ascending order, between a 0 and twice the largest number.

    Sorting rows of 1000 at every step is what this avoids: one norm leaves and one enters, and
    every other one moves by at most one place.

    Args:
        like: Gives k and n, the shape of the norms, their dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        rows, length = like.shape
        self._bounded = like.new_zeros(rows, length + 3)
        self._bounded[:, -2:] = torch.finfo(like.dtype).max  # the rank above the last has two
        self._block = max(1, _BLOCK // length) if host_may_read(like) else rows
        self._around = torch.arange(3, device=like.device)

    def fits(self, norms: Tensor) -> bool:
        """Tell whether there is room for norms of this shape, dtype and device."""
        held = self._bounded[:, 1:-2]
        return (held.shape, held.dtype, held.device) == (norms.shape, norms.dtype, norms.device)

    def sort_(self, norms: Tensor) -> None:
        """Begin anew with these norms, in the same memory.

        Args:
            norms: Shape (k, n), not negative; free places hold the largest number of the dtype.
        """
        self._bounded[:, 1:-2] = norms.sort(dim=1).values

    def with_another(self, ranks: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """Return order statistics as they would be with another norm in each row.

        Args:
            ranks: Shape (k,), int64, from 0.
            norms: Shape (k,), the other norms.

        Returns:
            Those of the ranks and those of the ones above, of shape (k,).
        """
        near = self._bounded.gather(1, ranks.unsqueeze(1) + self._around)
        # What is at a rank of the longer row lies between its neighbours in the shorter.
        lower, upper = torch.clamp(norms.unsqueeze(1), near[:, :2], near[:, 1:]).unbind(dim=1)
        return lower, upper

    def one_with_another(self, rank: int, norm: float) -> tuple[float, float]:
        """Return what `with_another` does for a single row. Host sync."""
        below, here, above = self._bounded[0, rank : rank + 3].tolist()
        return min(max(norm, below), here), min(max(norm, here), above)

    def replace_(self, leaving: Tensor, entering: Tensor) -> None:
        """Take one norm out of each row and put another in.

        Args:
            leaving: Shape (k, 1), held by the rows.
            entering: Shape (k, 1).
        """
        if len(self._bounded) <= self._block:
            _replace(self._bounded, leaving, entering)
            return
        parts = (tensor.split(self._block) for tensor in (self._bounded, leaving, entering))
        for part in zip(*parts, strict=True):
            _replace(*part)

    def replace_one_(self, leaving: float, entering: float) -> None:
        """Do what `replace_` does for a single row on the CPU."""
        row = self._bounded.numpy()[0, 1:-2]
        old, new = row.searchsorted([leaving, entering]).tolist()
        if new > old:
            row[old : new - 1] = row[old + 1 : new]
            row[new - 1] = entering
        else:
            row[new + 1 : old + 1] = row[new:old]
            row[new] = entering


def _replace(bounded: Tensor, leaving: Tensor, entering: Tensor) -> None:
    below, above = bounded[:, :-2], bounded[:, 1:-1]
    left = torch.where(below < leaving, below, above)
    torch.clamp(entering, left[:, :-1], left[:, 1:], out=bounded[:, 1:-2])
