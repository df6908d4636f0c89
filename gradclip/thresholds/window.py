"""The last norms of each label, for rules that look back over a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.base import host_may_read
from .adaptive import AdaptiveThreshold
from .arithmetic import is_number

WINDOW, COUNTS = "window", "counts"


class WindowThreshold(AdaptiveThreshold):
    """A rule over the last norms of each label, as measured.

    They are kept in a ring, which costs the same at every step and never grows: k ``length``
    norms and k counts. Places that are still free hold the largest number of the dtype, so that
    they come last in any order.

    Args:
        length: How many norms of a label are kept.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.
    """

    def __init__(
        self, length: int, *, cap: float | None = None, floor: float | None = None
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self._length = length

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        free, shape = torch.finfo(dtype).max, (count, self._length)
        return {
            WINDOW: torch.full(shape, free, device=device, dtype=dtype),
            COUNTS: torch.zeros(count, device=device, dtype=torch.int64),
        }

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`."""
        self._places = torch.arange(self._length, device=device)
        super().start(labels, device, dtype)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`: free places of another dtype hold its largest number."""
        window = self.state[WINDOW]
        window.masked_fill_(~self.filled(), torch.finfo(window.dtype).max)

    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """See `AdaptiveThreshold.learn`: each norm takes the place of the oldest of its label."""
        window, counts = self.state[WINDOW], self.state[COUNTS]
        if is_number(norms) and observed is None:
            ring, place = window.numpy()[0], counts.item() % self._length
            oldest, ring[place] = ring[place].item(), norms.item()
            self.replaced_one(oldest, ring[place].item())
            counts += 1
            return
        places = (counts % self._length).unsqueeze(1)
        oldest, newest = window.gather(1, places), norms.unsqueeze(1)
        if observed is not None:
            newest = torch.where(observed.unsqueeze(1), newest, oldest)
        window.scatter_(1, places, newest)
        self.replaced(oldest, newest)
        counts += 1 if observed is None else observed

    def replaced(self, oldest: Tensor, newest: Tensor) -> None:
        """Hear which norms left the window and which entered it, both of shape (k, 1).

        A free place that was taken is the largest number of the dtype.
        """

    def replaced_one(self, oldest: float, newest: float) -> None:
        """Hear the same where there is one label on the CPU."""

    def kept(self) -> Tensor:
        """Return how many norms of each label the window holds; shape (k,), int64."""
        return self.state[COUNTS].clamp(max=self._length)

    def kept_numbers(self) -> NDArray[Any]:
        """Return the norms that the window holds, where there is one label on the CPU."""
        count = self.state[COUNTS].item()
        return self.state[WINDOW].numpy()[0, : min(int(count), self._length)]

    def filled(self) -> Tensor:
        """Return which places are taken; shape (k, length), bool."""
        return self._places < self.state[COUNTS].unsqueeze(1)


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
