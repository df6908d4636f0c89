"""The parameters and gradients that optimizers hold, without duplicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from ..scopes.norm_indices import NormIndices

# One call into C for all tensors costs less than a line of Python for each.
PLAIN = {Tensor}
"""The types of gradients that are no subclass."""
_GROUPS = attrgetter("param_groups")
_PARAMETERS = itemgetter("params")
GRADIENT = attrgetter("grad")
"""Returns the gradient of a parameter, None without one."""


def parameters_of(groups: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Return every parameter of an optimizer's parameter groups, in order."""
    return chain.from_iterable(map(_PARAMETERS, groups))


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one, each object once even if it is shared."""
    gradients = [*map(GRADIENT, parameters)]
    if {*map(type, gradients)} != PLAIN:
        gradients = [gradient for gradient in gradients if gradient is not None]
    return distinct(gradients)


def gradients_held(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of an optimizer's parameters, each object once."""
    return gradients_of(parameters_of(optimizer.param_groups))


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, each object once, in the order of their first occurrence."""
    # By identity: comparing tensors with == compares their elements.
    if len({*map(id, tensors)}) == len(tensors):
        return tensors
    return list({id(tensor): tensor for tensor in tensors}.values())


@dataclass(frozen=True, slots=True)
class HeldGradients:
    """The gradients of some optimizers, with one entry of every list for each gradient."""

    gradients: list[Tensor] = field(default_factory=list)
    norm_indices: list[NormIndices] = field(default_factory=list)
    """The norm indices of each gradient; empty if all gradients share one norm."""
    names: Sequence[str] = field(default_factory=list)
    """The name of each gradient's parameter; empty if no record needs it."""
    counts_here: list[bool] = field(default_factory=list)
    """True if this rank counts the gradient, False if another rank counts its copy; empty if all
    gradients share one norm."""
    weights: list[Weight] = field(default_factory=list)
    """The parameters, if the threshold reads their norms."""

    def without(self, ids: set[int]) -> HeldGradients:
        """Return the gradients, and their weights, without those of some ids."""
        if not ids:
            return self
        kept = [id(gradient) not in ids for gradient in self.gradients]
        return HeldGradients(
            list(compress(self.gradients, kept)),
            list(compress(self.norm_indices, kept)),
            list(compress(self.names, kept)),
            list(compress(self.counts_here, kept)),
            # A weight without a gradient here may have one on another rank.
            [weight for weight in self.weights if id(weight.parameter.grad) not in ids],
        )


def parameters_held(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Return every parameter of several optimizers, in order."""
    return parameters_of(chain.from_iterable(map(_GROUPS, optimizers)))


class Weight(NamedTuple):
    """A parameter whose norm the threshold reads."""

    parameter: Tensor
    norm_indices: NormIndices
    counts: bool
    """True if this rank counts the parameter, False if another rank counts its copy."""
