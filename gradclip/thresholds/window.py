"""A window of recent norms for each label, with its mean, median and percentile.

A rule has a `NormWindow`, whose two tensors are the state of the rule. `NormWindow.limits` gives it
a `Row` where there is one norm on the CPU, with statistics that are numbers, else `Rows`, with
statistics of shape (k,): a rule is written once for both. `OrderedNorms` keeps a window sorted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engines.base import host_may_read


class NormWindow:
    """A ring of the last norms of each label, as measured.

    A step costs the same whatever the length, and the memory never grows: k ``length`` norms and k
    counts. Free slots hold the largest number of the dtype, so that they come last when a row is
    sorted.

    Args:
        length: How many norms of each label are kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.norms = torch.empty(0, length, device="cpu")
        """Shape (k, length)."""
        self.counts: Tensor
        """How many norms of each label were ever added; shape (k,). `follow` sets it."""
        self._slots = torch.arange(length, device="cpu")

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state of an empty window; see `AdaptiveThreshold.fresh`."""
        free, shape = torch.finfo(dtype).max, (count, self.length)
        return {
            "window": torch.full(shape, free, device=device, dtype=dtype),
            "counts": torch.zeros(count, device=device, dtype=torch.int64),
        }

    def follow(self, state: Mapping[str, Tensor]) -> None:
        """Work on these tensors from now on; see `AdaptiveThreshold.rebuild`."""
        self.norms, self.counts = state["window"], state["counts"]
        # Made anew only where it has to be: a captured CUDA graph may read the ones before.
        if self._slots.device != self.norms.device:
            self._slots = torch.arange(self.length, device=self.norms.device)
        # A loaded state may be of another dtype, whose largest number is another one.
        self.norms.masked_fill_(~self.filled(), torch.finfo(self.norms.dtype).max)

    def add(self, norms: Tensor | float, observed: Tensor | None) -> tuple[Any, Any]:
        """Replace the oldest norm of each label; see `AdaptiveThreshold.learn`.

        Returns:
            The norms that left and those that entered, as tensors of shape (k, 1), or as numbers
            where there is one norm on the CPU. A free slot counts as a norm that left.
        """
        if isinstance(norms, float):
            ring, count = self.norms.numpy()[0], self.counts.item()
            slot = count % self.length
            oldest, ring[slot] = ring[slot].item(), norms
            self.counts.fill_(count + 1)
            return oldest, ring[slot].item()  # read again: a ring of float32 has rounded it
        slots = (self.counts % self.length).unsqueeze(1)
        leaving, entering = self.norms.gather(1, slots), norms.unsqueeze(1)
        if observed is not None:
            entering = torch.where(observed.unsqueeze(1), entering, leaving)
        self.norms.scatter_(1, slots, entering)
        self.counts += 1 if observed is None else observed
        return leaving, entering

    def limits(self, norms: Tensor | float, warmup: int, limit: Callable[[Row | Rows], Any]) -> Any:
        """Return limits from statistics of the window, infinity during a warm-up.

        Args:
            norms: The norms of the present step, shape (k,).
            warmup: From which norm of a label on there is a limit, the present one counted; the
                third at the earliest, since a deviation needs two before it.
            limit: Returns the limits from a row, as a number, or from rows, as a tensor.

        Returns:
            Shape (k,).
        """
        needed = max(warmup, 3) - 1
        if not isinstance(norms, float):
            return torch.where(self.counts >= needed, limit(Rows(self)), math.inf)
        count = int(self.counts.item())
        row = Row(self.norms.numpy()[0, :count])
        return limit(row) if count >= needed else math.inf

    def filled(self) -> Tensor:
        """Return which slots hold a norm; shape (k, length), bool."""
        return self._slots < self.counts.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Row:
    """Two or more norms of one label. Its statistics are numbers."""

    norms: NDArray[Any]

    def mean_and_deviation(self) -> tuple[float, float]:
        """Return the mean and the sample deviation (n - 1)."""
        norms, count = self.norms.tolist(), len(self.norms)
        mean = sum(norms) / count
        return mean, math.dist(norms, [mean] * count) / math.sqrt(count - 1)

    def median_and_distance(self) -> tuple[float, float]:
        """Return the median and the median distance from it."""
        median = self._median(self.norms)
        return median, self._median(abs(self.norms - median))

    def _median(self, values: NDArray[Any]) -> float:
        ordered, count = np.sort(values), len(values)
        lower, upper = ordered[(count - 1) // 2].item(), ordered[count // 2].item()
        return float(lower + (upper - lower) / 2)  # where lower + upper could be infinite


@dataclass(frozen=True, slots=True)
class Rows:
    """The norms of k labels. Its statistics are tensors of shape (k,).

    Those of a label with less than two norms are any value, NaN included.
    """

    window: NormWindow

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return the means and the sample deviations (n - 1)."""
        norms, filled, counts = self.window.norms, self.window.filled(), self._counts()
        mean = torch.where(filled, norms, 0.0).sum(dim=1) / counts
        # From the mean itself: a sum of squares would lose what differs, a running one drift.
        distance = torch.where(filled, norms - mean.unsqueeze(1), 0.0)
        degrees = (counts - 1).to(norms.dtype)
        return mean, torch.linalg.vector_norm(distance, dim=1) / degrees.sqrt()

    def median_and_distance(self) -> tuple[Tensor, Tensor]:
        """Return the medians and the median distances from them."""
        norms, counts = self.window.norms, self._counts()
        middle = torch.stack([(counts - 1).clamp(min=0) // 2, counts // 2], dim=1)
        median = self._median(norms, middle)
        # Half of the norms lie between the median and the largest number, which free slots hold:
        # these are never nearer than the distance in the middle.
        return median, self._median((norms - median.unsqueeze(1)).abs(), middle)

    def _counts(self) -> Tensor:
        return self.window.counts.clamp(max=self.window.length)

    def _median(self, values: Tensor, middle: Tensor) -> Tensor:
        """Return the mean of the two values in each row whose ranks are in ``middle``."""
        lower, upper = values.sort(dim=1).values.gather(1, middle).unbind(dim=1)
        return lower + (upper - lower) / 2


_BLOCK = 2**16
"""Elements that the CPU reorders at once: a few times as fast as all of them through memory."""


class OrderedNorms:
    """Rows of norms in ascending order, between a 0 and twice the largest number.

    Sorting rows of 1000 at every step is what this avoids: one norm leaves and one enters, and
    every other one moves by at most one position.

    Args:
        like: Gives k and n, the shape of the norms, their dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        rows, length = like.shape
        self._bounded = like.new_zeros(rows, length + 3)
        self._bounded[:, -2:] = torch.finfo(like.dtype).max  # the rank above the last needs two
        self._block = max(1, _BLOCK // length) if host_may_read(like) else rows
        self._neighbours = torch.arange(3, device=like.device)

    def fits(self, norms: Tensor) -> bool:
        """Return whether there is room for norms of this shape, dtype and device."""
        held = self._bounded[:, 1:-2]
        return (held.shape, held.dtype, held.device) == (norms.shape, norms.dtype, norms.device)

    def sort_(self, norms: Tensor) -> None:
        """Hold these norms from now on, in the same memory.

        Args:
            norms: Shape (k, n), not negative; free slots hold the largest number of the dtype.
        """
        self._bounded[:, 1:-2] = norms.sort(dim=1).values

    def with_another(self, ranks: Any, norms: Any) -> tuple[Any, Any]:
        """Return the order statistics that rows would have with one more norm each.

        Args:
            ranks: Shape (k,), whole numbers from 0; or one number for the one row on the CPU.
            norms: Shape (k,), the additional norms; or a number as well.

        Returns:
            The norms of these ranks and those of the ranks above, tensors or numbers.
        """
        # The norm of a rank in the longer row lies between its neighbours in the shorter one.
        if isinstance(ranks, Tensor):
            near = self._bounded.gather(1, ranks.long().unsqueeze(1) + self._neighbours)
            return torch.clamp(norms.unsqueeze(1), near[:, :2], near[:, 1:]).unbind(dim=1)  # type: ignore[return-value]
        rank = int(ranks)
        below, here, above = self._bounded.numpy()[0, rank : rank + 3].tolist()
        return min(max(norms, below), here), min(max(norms, here), above)

    def replace_(self, leaving: Any, entering: Any) -> None:
        """Take one norm out of each row and put another one in.

        Args:
            leaving: Shape (k, 1), a norm of each row; or one number for the one row on the CPU.
            entering: Shape (k, 1), or one number.
        """
        if not isinstance(leaving, Tensor):
            _replace_in_row(self._bounded.numpy()[0, 1:-2], leaving, entering)
            return
        if len(self._bounded) <= self._block:
            _replace_in_rows(self._bounded, leaving, entering)
            return
        blocks = (tensor.split(self._block) for tensor in (self._bounded, leaving, entering))
        for block in zip(*blocks, strict=True):
            _replace_in_rows(*block)


def _replace_in_row(row: NDArray[Any], leaving: float, entering: float) -> None:
    old, new = row.searchsorted([leaving, entering]).tolist()
    if new > old:
        row[old : new - 1] = row[old + 1 : new]
        row[new - 1] = entering
    else:
        row[new + 1 : old + 1] = row[new:old]
        row[new] = entering


def _replace_in_rows(bounded: Tensor, leaving: Tensor, entering: Tensor) -> None:
    """Shift whole rows by comparisons: each position needs only itself and its neighbours."""
    below, above = bounded[:, :-2], bounded[:, 1:-1]
    without = torch.where(below < leaving, below, above)
    torch.clamp(entering, without[:, :-1], without[:, 1:], out=bounded[:, 1:-2])
