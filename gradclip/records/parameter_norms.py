"""What each parameter had in the norm of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..engines.base import root


@dataclass(frozen=True, slots=True, eq=False)
class ParameterSums:
    """The power sums of the gradients of a step, where they were measured."""

    names: Sequence[str]
    """Names of the parameters."""
    sums: Sequence[Tensor]
    """Their sums one after the other, in vectors of any device."""
    nonfinite: str | None = None
    """Which parameters hold NaN or infinity, and how many; None where the host did not look."""

    def __len__(self) -> int:
        return len(self.names)


class ParameterNorms(Mapping[str, float]):
    """Norms of the gradients of a step by the names of their parameters, computed when read.

    Args:
        of_step: Names the parameters.
        sums: The power sums of many steps, float64 on the host.
        first: Where those of this step begin.
        order: p of the norm.
    """

    def __init__(self, of_step: ParameterSums, sums: Tensor, first: int, order: float) -> None:
        self._names = of_step.names
        self._all_sums = sums
        self._first = first
        self._order = order
        self._by_name: dict[str, float] | None = None
        self.nonfinite = of_step.nonfinite
        """See `ParameterSums`."""

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    @property
    def _sums(self) -> Tensor:
        return self._all_sums[self._first : self._first + len(self)]

    def __getitem__(self, name: str) -> float:
        if self._by_name is None:
            self._by_name = dict(zip(self._names, self._norms(self._sums), strict=True))
        return self._by_name[name]

    def __repr__(self) -> str:
        return repr({**self})

    def __reduce__(self) -> tuple[type, tuple[dict[str, float]]]:
        return dict, ({**self},)  # not the sums of all the steps of its batch

    def largest(self, count: int) -> dict[str, float]:
        """Return the largest norms, from the largest on, with NaN before infinity."""
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


def rescaled(sums: Tensor, order: float, scale: Tensor) -> Tensor:
    """Return the power sums of gradients that were multiplied by a scale, one element."""
    scale = scale.to(sums)
    if order == math.inf:
        return sums / scale
    return (root(sums.clone(), order) / scale).pow_(order)  # a power of the scale may overflow
