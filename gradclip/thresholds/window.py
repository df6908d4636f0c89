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
        self.columns: Tensor
        """The norms as a view of shape (length, k), which vectors of k numbers fit."""
        self.size: Tensor
        """``length`` on the norms' device, shape (1,): torch multiplies by the reciprocal of a
        number, which rounds otherwise."""
        self.root_of_degrees: Tensor
        """Root of ``length - 1``, likewise."""
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
        self.columns, self._counts_row = self.norms.t(), self.counts.unsqueeze(0)
        self.size = self.norms.new_full((1,), self.length)
        self.root_of_degrees = (self.size - 1).sqrt()
        # A loaded state may be of another dtype, whose largest number is another one.
        self.norms.masked_fill_(~self.filled(), torch.finfo(self.norms.dtype).max)

    def add(self, norms: Tensor | float, observed: Tensor | None) -> tuple[Any, Any]:
        """Replace the oldest norm of each label; see `AdaptiveThreshold.learn`.

        Returns:
            The norms that left and those that entered, as tensors of shape (1, k), or as numbers
            where there is one norm on the CPU. A free slot counts as a norm that left.
        """
        if isinstance(norms, float):
            ring, count = self.norms.numpy()[0], self.counts.item()
            slot = count % self.length
            oldest, ring[slot] = ring[slot].item(), norms
            self.counts.fill_(count + 1)
            return oldest, ring[slot].item()  # read again: a ring of float32 has rounded it
        slots = self._counts_row % self.length
        leaving = self.columns.gather(0, slots)
        entering = norms.unsqueeze(0) if observed is None else torch.where(observed, norms, leaving)
        self.columns.scatter_(0, slots, entering)
        self.counts += 1 if observed is None else observed
        return leaving, entering

    def limits(
        self,
        norms: Tensor | float,
        warmup: int,
        limit: Callable[[Row | Rows], Any],
        *,
        full: bool,
    ) -> Any:
        """Return limits from statistics of the window, infinity during a warm-up.

        Args:
            norms: The norms of the present step, shape (k,).
            warmup: From which norm of a label on there is a limit, the present one counted; the
                third at the earliest, since a deviation needs two before it.
            limit: Returns the limits from a row, as a number, or from rows, as a tensor.
            full: True if the host knows that all windows are full and no warm-up goes on.

        Returns:
            Shape (k,).
        """
        if full:
            return limit(Rows(self, full=True))
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
    full: bool = False
    """True if the host knows that all windows are full."""

    def mean_and_deviation(self) -> tuple[Tensor, Tensor]:
        """Return the means and the sample deviations (n - 1)."""
        norms, root = self.window.columns, self.window.root_of_degrees
        if self.full:
            mean = norms.sum(dim=0) / self.window.size
            distance = norms - mean
        else:
            filled, counts = self.window.filled().t(), self._counts()
            mean = torch.where(filled, norms, 0.0).sum(dim=0) / counts
            distance = torch.where(filled, norms - mean, 0.0)
            root = (counts - 1).to(norms.dtype).sqrt()
        # From the mean itself: a sum of squares would lose what differs, a running one drift.
        return mean, torch.linalg.vector_norm(distance, dim=0) / root

    def median_and_distance(self) -> tuple[Tensor, Tensor]:
        """Return the medians and the median distances from them."""
        norms, middle = self.window.columns, None
        if not self.full:
            counts = self._counts()
            middle = torch.stack([(counts - 1).clamp(min=0) // 2, counts // 2])
        median = self._median(norms, middle)
        # Half of the norms lie between the median and the largest number, which free slots hold:
        # these are never nearer than the distance in the middle.
        return median, self._median((norms - median).abs_(), middle)

    def _counts(self) -> Tensor:
        return self.window.counts.clamp(max=self.window.length)

    def _median(self, values: Tensor, middle: Tensor | None) -> Tensor:
        """Return the mean of the two values in each column in the middle of it.

        Args:
            values: Shape (length, k).
            middle: The ranks of the two, shape (2, k); None for full windows.
        """
        ordered = values.sort(dim=0).values
        if middle is not None:
            lower, upper = ordered.gather(0, middle).unbind()
        else:
            length = self.window.length
            lower, upper = ordered[(length - 1) // 2], ordered[length // 2]
        # Half a number is exact: one rounding or two, with or without a fused multiplication.
        return torch.add(lower, upper - lower, alpha=0.5)


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
        # Views made once: each is an operator of its own.
        self._columns = columns = self._bounded.t()
        self._views = columns[:-2], columns[1:-1], columns[1:-2]
        self._block = max(1, _BLOCK // length) if host_may_read(like) else rows
        self._neighbours = torch.arange(3, device=like.device).unsqueeze(1)

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

    def around(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return views, always up to date, of the norms between which two others lie.

        These are the norm of a rank that each row would have with another norm, as `with_another`
        returns it, and that of the next rank.

        Returns:
            The lower bounds of the two, and the upper bounds, which are the norms of these ranks
            without another norm. Both of shape (2, k).
        """
        return self._columns[rank : rank + 2], self._columns[rank + 1 : rank + 3]

    def with_another(self, ranks: Any, norms: Any) -> Any:
        """Return the order statistics that rows would have with one more norm each.

        Args:
            ranks: Shape (k,), whole numbers from 0; or one number for the one row on the CPU.
            norms: Shape (k,), the additional norms; or a number as well.

        Returns:
            The norms of these ranks and those of the ranks above: shape (2, k), or two numbers.
        """
        # The norm of a rank in the longer row lies between its neighbours in the shorter one.
        if isinstance(ranks, Tensor):
            near = self._columns.gather(0, ranks.long() + self._neighbours)
            return torch.clamp(norms, near[:2], near[1:])
        rank = int(ranks)
        below, here, above = self._bounded.numpy()[0, rank : rank + 3].tolist()
        return min(max(norms, below), here), min(max(norms, here), above)

    def replace_(self, leaving: Any, entering: Any) -> None:
        """Take one norm out of each row and put another one in.

        Args:
            leaving: Shape (1, k), a norm of each row; or one number for the one row on the CPU.
            entering: Shape (1, k), or one number.
        """
        if not isinstance(leaving, Tensor):
            _replace_in_row(self._bounded.numpy()[0, 1:-2], leaving, entering)
            return
        if len(self._bounded) <= self._block:
            _replace_in_columns(*self._views, leaving, entering)
            return
        blocks = (tensor.split(self._block, 1) for tensor in (*self._views, leaving, entering))
        for block in zip(*blocks, strict=True):
            _replace_in_columns(*block)


def _replace_in_row(row: NDArray[Any], leaving: float, entering: float) -> None:
    old, new = row.searchsorted([leaving, entering]).tolist()
    if new > old:
        row[old : new - 1] = row[old + 1 : new]
        row[new - 1] = entering
    else:
        row[new + 1 : old + 1] = row[new:old]
        row[new] = entering


def _replace_in_columns(
    below: Tensor, above: Tensor, held: Tensor, leaving: Tensor, entering: Tensor
) -> None:
    """Shift whole columns by comparisons: a position needs only itself and its neighbours."""
    without = torch.where(below < leaving, below, above)
    torch.clamp(entering, without[:-1], without[1:], out=held)
