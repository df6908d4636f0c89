"""Gradients and parameters as optimizers hold them, each object once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
_PARAMETERS = itemgetter("params")
_GRADIENT = attrgetter("grad")


def parameters_of(groups: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """Return every parameter of an optimizer's parameter groups, in order."""
    return chain.from_iterable(map(_PARAMETERS, groups))


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients that are there, each object once however many parameters share it."""
    found = [*map(_GRADIENT, parameters)]
    if {*map(type, found)} != PLAIN:
        found = [gradient for gradient in found if gradient is not None]
    return distinct(found)


def gradients_held(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of an optimizer's parameters, each object once."""
    return gradients_of(parameters_of(optimizer.param_groups))


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, each object once, in the order in which they come first."""
    if len({*map(id, tensors)}) == len(tensors):
        return tensors
    return list({id(tensor): tensor for tensor in tensors}.values())


@dataclass(frozen=True, slots=True)
class HeldGradients:
    """Gradients that optimizers hold."""

    gradients: list[Tensor] = field(default_factory=list)
    norm_indices: list[NormIndices] = field(default_factory=list)
    """For each where its norms are; empty where all share one."""
    names: Sequence[str] = field(default_factory=list)
    """For each the name of that parameter; empty where nobody asks for it."""
    counts_here: list[bool] = field(default_factory=list)
    """For each whether it counts here, not as a copy on another rank; empty where all share one."""
    weights: list[Weight] = field(default_factory=list)
    """The parameters, where their norms are asked for."""

    def filtered(self, wanted: Callable[[Tensor], bool]) -> HeldGradients:
        """Return those of which the gradient is wanted."""
        kept = [wanted(gradient) for gradient in self.gradients]
        return HeldGradients(
            list(compress(self.gradients, kept)),
            list(compress(self.norm_indices, kept)),
            list(compress(self.names, kept)),
            list(compress(self.counts_here, kept)),
            [each for each in self.weights if (g := each.parameter.grad) is None or wanted(g)],
        )


def parameters_held(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """Return every parameter of several optimizers, in order."""
    return parameters_of(group for optimizer in optimizers for group in optimizer.param_groups)


class Weight(NamedTuple):
    """A parameter whose norm is asked for."""

    parameter: Tensor
    norm_indices: NormIndices
    counts: bool
    """Whether it counts here, not as a copy on another rank."""
