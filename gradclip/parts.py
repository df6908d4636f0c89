"""What each parameter had in the norm of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .engines.base import root


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The power sums of the gradients of a step, where they were measured."""

    names: Sequence[str]
    """Names of the parameters."""
    sums: Sequence[Tensor]
    """Their sums one after the other, in vectors of any device."""
    nonfinite: str | None = None
    """Which parameters hold NaN or infinity, and how many; None where the host did not look."""


class NormsByParameter(Mapping[str, float]):
    """Norms of the gradients of a step by the names of their parameters, computed when read.

    Args:
        parts: Names the parameters.
        sums: The power sums of many steps, float64 on the host.
        first: Where those of this step begin.
        order: p of the norm.
    """

    def __init__(self, parts: Parts, sums: Tensor, first: int, order: float) -> None:
        self._names = parts.names
        self._all_sums = sums
        self._first = first
        self._order = order
        self._by_name: dict[str, float] | None = None
        self.nonfinite = parts.nonfinite
        """See `Parts`."""

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @property
    def _sums(self) -> Tensor:
        return self._all_sums[self._first : self._first + len(self)]

    def __getitem__(self, name: str) -> float:
        if self._by_name is None:
            self._by_name = self.largest(None)
        return self._by_name[name]

    def largest(self, count: int | None) -> dict[str, float]:
        """Return the largest norms, with NaN before infinity; all in their order for None."""
        if count is None:
            return dict(zip(self._names, self._norms(self._sums), strict=True))
        sums, places = self._sums.topk(min(count, len(self)))
        names = (self._names[place] for place in places.tolist())
        return dict(zip(names, self._norms(sums), strict=True))

    def most(self, share: float, count: int) -> dict[str, float]:
        """Return the largest norms that have a share of the whole sum, at most so many."""
        sums = self._sums.sort(descending=True).values[:count].cumsum(0)
        whole = self._sums.amax() if self._order == math.inf else self._sums.sum()
        return self.largest(min(int((sums < share * whole).sum()) + 1, count))

    def _norms(self, sums: Tensor) -> list[float]:
        norms = sums if self._order == math.inf else root(sums.clone(), self._order)
        return norms.tolist()


def sums_of_rows(sums: Tensor, lengths: Sequence[int], order: float) -> Tensor:
    """Return the power sums of gradients from those of their rows. No host sync.

    Args:
        sums: One for each row, gradient after gradient.
        lengths: How many rows each has.
        order: p of the norm.
    """
    kind = "max" if order == math.inf else "sum"
    on_device = torch.tensor(lengths, device="cpu").to(sums.device, non_blocking=True)
    return torch.segment_reduce(sums, kind, lengths=on_device, initial=0, unsafe=True)
