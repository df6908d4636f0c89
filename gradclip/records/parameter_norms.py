"""The gradient norm of each parameter at one step, computed from power sums on first access."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines.base import root


@dataclass(slots=True, eq=False)
class ParameterSums:
    """The power sum of each parameter's gradient at one step, on the device that measured it."""

    names: Sequence[str]
    """Names of the parameters."""
    sums: Sequence[Tensor]
    """The power sums in the order of the names, in one vector or several, of any device."""
    nonfinite: str | None = None
    """Names of the parameters that hold NaN or infinity, with the number of these elements; None
    if the host did not look."""

    def divided(self, factor: float | Tensor, order: float) -> ParameterSums:
        """Return the power sums of gradients that were multiplied by a factor since."""
        scale = torch.as_tensor(factor)
        sums = [rescaled(vector, order, scale) for vector in self.sums]
        return ParameterSums(self.names, sums, self.nonfinite)


def joined_sums(parts: Sequence[ParameterSums]) -> ParameterSums:
    """Return the power sums of a step whose parameters were measured in parts, each in one."""
    sums = [vector for part in parts for vector in part.sums]
    nonfinite = ", ".join(part.nonfinite for part in parts if part.nonfinite) or None
    names = parts[0].names
    if len(parts) > 1 and all(part.names is names for part in parts):
        # Across ranks each part has all parameters, 0 for those of other parts.
        return ParameterSums(names, [torch.stack(sums).sum(0)], nonfinite)
    return ParameterSums([name for part in parts for name in part.names], sums, nonfinite)


class ParameterNorms(Mapping[str, float]):
    """The norms of one step's gradients by the names of their parameters.

    Most steps are never read, so a root is taken only when somebody asks.

    Args:
        of_step: Names the parameters.
        sums: The power sums of a whole batch of steps, float64 on the host.
        first: Index of the first power sum of this step.
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
        # A plain dict: the sums of all the steps of the batch would go along otherwise.
        return dict, ({**self},)

    def largest(self, count: int) -> dict[str, float]:
        """Return the largest norms in falling order; NaN comes first, then infinity."""
        sums, indices = self._sums.topk(min(count, len(self)))
        names = (self._names[index] for index in indices.tolist())
        return dict(zip(names, self._norms(sums), strict=True))

    def carrying(self, share: float, count: int) -> dict[str, float]:
        """Return the fewest norms that have a share of the whole power sum, at most ``count``."""
        sums = self._sums.sort(descending=True).values[:count].cumsum(0)
        whole = self._sums.amax() if self._order == math.inf else self._sums.sum()
        return self.largest(min(int((sums < share * whole).sum()) + 1, count))

    def _norms(self, sums: Tensor) -> list[float]:
        # The sum of an infinity norm is the norm itself. `root` writes into its argument.
        norms = sums if self._order == math.inf else root(sums.clone(), self._order)
        return norms.tolist()


def rescaled(sums: Tensor, order: float, scale: Tensor) -> Tensor:
    """Return the power sums of gradients that a scale of one element was multiplied into."""
    scale = scale.to(sums)
    if order == math.inf:
        return sums / scale
    # By way of the norm: a power of the scale may overflow, (2**16)**100 does.
    return (root(sums.clone(), order) / scale).pow_(order)
