"""The norms of one step that are measured and clipped in parts, one after the other.

A rule takes all norms at once, so a part has its norms in their places among all, and 0 for the
others, which count as norms without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..engines import norm_dtype
from ..records.parameter_norms import ParameterSums, joined_sums
from ..scopes.norm_indices import NOWHERE, NormIndices
from .held import HeldGradients
from .step import StepGradients


class OwnNorms(NamedTuple):
    """The norms that some gradients have among all norms of a clipper."""

    indices: Tensor
    """Of these norms among all, rising; shape (j,), int64, on the device of the norms."""
    numbers: frozenset[int]
    """The same on the host."""
    local: dict[int, NormIndices]
    """The norm indices of each gradient among these norms, by the id of those among all."""

    @classmethod
    def of(cls, held: HeldGradients, device: torch.device) -> OwnNorms:
        """Return the norms of gradients, with the device of all norms."""
        given = {id(item): item for item in held.norm_indices}
        used = torch.cat([item.indices for item in given.values()]).unique()
        used = used[used != NOWHERE]
        local = {}
        for key, item in given.items():
            places = torch.searchsorted(used, item.indices)
            places[item.indices == NOWHERE] = NOWHERE
            local[key] = NormIndices(places, item.rows)
        return cls(used.to(device), frozenset(used.tolist()), local)

    def among_these(self, held: HeldGradients) -> HeldGradients:
        """Return gradients with their norm indices among these norms; none if all share one."""
        is_one = len(self.numbers) == 1 and not any(item.rows for item in held.norm_indices)
        weights = [
            weight._replace(norm_indices=self.local[id(weight.norm_indices)])
            for weight in held.weights
            if id(weight.norm_indices) in self.local
        ]
        return HeldGradients(
            held.gradients,
            [] if is_one else [self.local[id(item)] for item in held.norm_indices],
            held.names,
            held.counts_here,
            weights,
        )


class StepPart:
    """The gradients of some of a step's norms, in the way that rules ask for those of all.

    Args:
        gradients: The gradients, with their norms alone.
        indices: The indices of these norms among all, shape (j,).
        count: k, the number of all norms.
    """

    partial = True

    def __init__(self, gradients: StepGradients, indices: Tensor, count: int) -> None:
        self._gradients = gradients
        self._indices = indices
        self._count = count

    @property
    def loss(self) -> float | Tensor | None:
        """See `StepGradients.loss`."""
        return self._gradients.loss

    def among_all(self, values: Tensor) -> Tensor:
        """Return values of shape (j,) in their places among k, 0 elsewhere."""
        return values.new_zeros(self._count).index_copy(0, self._indices, values)

    def present(self) -> Tensor:
        """See `StepGradients.present`."""
        return self.among_all(self._gradients.present())

    def weight_norms(self) -> Tensor:
        """See `StepGradients.weight_norms`."""
        return self.among_all(self._gradients.weight_norms())


class StepParts:
    """The parts of one step so far.

    Args:
        count: k, the number of all norms.
        device: The device of the norms.
    """

    partial = False
    loss: float | Tensor | None = None
    """The loss of the step, as the newest part has it after it was measured."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._count = count
        self._device = device
        self._indices: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {}
        self._sums: list[ParameterSums] = []

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self._indices)

    def clip_(
        self,
        gradients: StepGradients,
        indices: Tensor,
        thresholds_of: Callable[[StepPart, Tensor], Tensor],
        *,
        needs_weights: bool,
    ) -> None:
        """Measure and scale the gradients of a part.

        Args:
            gradients: The gradients, with their norms alone.
            indices: The indices of these norms among all, shape (j,).
            thresholds_of: Returns the thresholds of all norms, shape (k,).
            needs_weights: True if the rule reads the norms of the parameters.
        """
        norms = gradients.norms()
        part, self.loss = StepPart(gradients, indices, self._count), gradients.loss
        thresholds = thresholds_of(part, part.among_all(norms))[indices]
        decision = gradients.decide_(norms, thresholds)
        gradients.scale_(decision)
        self._add(
            norms=norms,
            thresholds=thresholds,
            coefficients=decision.reduction,
            present=gradients.present(),
        )
        if needs_weights:
            self._add(weight_norms=gradients.weight_norms())
        self._indices.append(indices)
        if gradients.parameter_sums is not None:
            self._sums.append(gradients.parameter_sums)

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def norms(self) -> Tensor:
        """Return all norms, 0 for those of no part; shape (k,)."""
        return self._together("norms", self._base(0))

    def thresholds(self, otherwise: Tensor) -> Tensor:
        """Return the thresholds that were applied, others for norms of no part; shape (k,)."""
        return self._together("thresholds", otherwise)

    def coefficients(self) -> Tensor:
        """Return the factors of the norms, 1 for those of no part; shape (k,)."""
        return self._together("coefficients", self._base(1))

    def present(self) -> Tensor:
        """Return which norms have a gradient; shape (k,), bool."""
        return self._together("present", self._base(0).bool())

    def weight_norms(self) -> Tensor:
        """Return the norms of the parameters, 0 for those of no part; shape (k,)."""
        return self._together("weight_norms", self._base(0))

    def parameter_sums(self) -> ParameterSums | None:
        """Return the power sums of all parameters, if their norms are recorded."""
        return joined_sums(self._sums) if self._sums else None

    def _base(self, value: float) -> Tensor:
        dtype = norm_dtype(self._device)
        return torch.full((self._count,), value, dtype=dtype, device=self._device)

    def _together(self, name: str, otherwise: Tensor) -> Tensor:
        return otherwise.index_copy(0, torch.cat(self._indices), torch.cat(self._values[name]))
