"""Names of parameters and groups, for people who have to find them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOST_NAMED = 10


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter of an optimizer."""

    name: str
    """The model's, else the one that the optimizer was given, else the place in the groups."""
    parameter: Tensor
    optimizer: int
    """Number of the optimizer."""
    group: int
    """Number of its parameter group."""
    has_given_name: bool
    """True if the model or the optimizer gave the name, False if it was generated."""


def named_parameters(
    optimizers: Sequence[Optimizer], model: nn.Module | None
) -> Iterator[NamedParameter]:
    """Yield every parameter of the optimizers once, under a name that no other one has."""
    known = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    named: set[int] = set()
    taken = set(known.values())
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            given = group.get("param_names") or []
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in named:
                    continue
                name = known.get(id(parameter))
                if name is None:
                    name = given[place] if place < len(given) else ""
                    name = "" if name in taken else name
                within = group_name(optimizers, number, index)
                named.add(id(parameter))
                taken.add(name)
                shown = name or f"{within}, parameter {place}"
                yield NamedParameter(shown, parameter, number, index, bool(name))


def group_name(optimizers: Sequence[Optimizer], optimizer: int, group: int) -> str:
    """Return the name of a parameter group."""
    several = f"optimizer {optimizer}, " if len(optimizers) > 1 else ""
    return f"{several}group {group}"


def describe_nonfinite(
    names: Sequence[str], gradients: Sequence[Tensor] | None, sums: Sequence[float]
) -> str:
    """List the parameters whose power sums are not finite, with how many elements. Host sync.

    Args:
        names: Names of the parameters.
        gradients: Their gradients; None where not all of them are here, to count no elements.
        sums: The power sums of these.
    """
    culprits = [index for index, total in enumerate(sums) if not math.isfinite(total)]
    found = [names[index] for index in culprits]
    if gradients is not None:
        for place, index in enumerate(culprits[:MOST_NAMED]):
            found[place] += f" ({_elements(gradients[index])})"
    return joined(found)


def _elements(gradient: Tensor) -> str:
    values = gradient.coalesce()._values() if gradient.is_sparse else gradient
    count = int(values.numel() - torch.isfinite(values).sum())
    if not count:
        return "the sum of its powers exceeds the range of float64"
    return f"{count} of {values.numel()} elements"


def joined(nonfinite: Sequence[str]) -> str:
    """Join what there is to say of parameters that are not finite."""
    if not nonfinite:
        return "none by itself: the sum of their powers exceeds the range of float64"
    more = len(nonfinite) - MOST_NAMED
    return ", ".join(nonfinite[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
