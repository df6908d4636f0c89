"""The norms of the parameters at one step, and of their changes in it, from power sums."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ..engines.base import root
from .parameter_norms import ParameterSums, joined_sums


class WeightSums:
    """Power sums of parameters before a step, and of their changes in it, on the device.

    Args:
        step: Index of the step, as the host knew it.
        is_open: Whether several optimizers add theirs, one after the other.
    """

    def __init__(self, step: int, *, is_open: bool) -> None:
        self.step = step
        self.is_open = is_open
        self._weights: list[ParameterSums] = []
        self._changes: list[ParameterSums] = []

    def add(self, weights: ParameterSums, changes: ParameterSums) -> None:
        """Add the parameters of an optimizer, both in the same order."""
        self._weights.append(weights)
        self._changes.append(changes)

    @property
    def names(self) -> Sequence[str]:
        """Names of the parameters so far."""
        return joined_sums(self._weights).names

    @property
    def vectors(self) -> list[Tensor]:
        """The power sums in the order of the names: first of all parameters, then of the changes.

        On any device.
        """
        return [
            vector for parts in (self._weights, self._changes) for vector in joined_sums(parts).sums
        ]


class WeightNorms(dict[str, float]):
    """The norms of parameters before a step, by name; plain to whoever copies or pickles it.

    Args:
        norms: The norms by name.
        step: The index by which the step was one to measure them.
        update_ratios: The norm of each parameter's change in the step, divided by its norm before.
    """

    def __init__(
        self, norms: Mapping[str, float], step: int, update_ratios: dict[str, float]
    ) -> None:
        super().__init__(norms)
        self.step = step
        self.update_ratios = update_ratios

    def __reduce__(self) -> tuple[type, tuple[dict[str, float]]]:
        return dict, ({**self},)


def is_due(norms: Mapping[str, float], every: int) -> bool:
    """Return whether a sink asks for norms, every so many steps; 0 for never.

    Steps that GradScaler skipped may be found only after a step was measured, which then has an
    earlier index. So the index counts by which it was measured.
    """
    return every > 0 and isinstance(norms, WeightNorms) and norms.step % every == 0


def weight_norms_of(
    of_steps: Sequence[WeightSums | None], sums: Tensor, order: float
) -> list[WeightNorms | None]:
    """Return the norms of some steps.

    Args:
        of_steps: The power sums of each step, None at steps without.
        sums: All of them in one vector, float64 on the host. Written.
        order: p of the norms.
    """
    roots = iter((sums if order == math.inf else root(sums, order)).tolist())
    return [None if each is None else _weight_norms(each, roots) for each in of_steps]


def _weight_norms(of_step: WeightSums, roots: Iterator[float]) -> WeightNorms:
    names = of_step.names
    norms = {name: next(roots) for name in names}
    changes = {name: next(roots) for name in names}
    # No share of nothing: weights may start at 0.
    ratios = {name: changes[name] / norm for name, norm in norms.items() if norm != 0}
    return WeightNorms(norms, of_step.step, ratios)
