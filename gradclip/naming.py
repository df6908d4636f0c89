"""Names of parameters and groups, for people who have to find them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
                    within = group_name(optimizers, number, index)
                    name = given[place] if place < len(given) else ""
                    name = f"{within}, parameter {place}" if not name or name in taken else name
                named.add(id(parameter))
                taken.add(name)
                yield NamedParameter(name, parameter, number, index)


def group_name(optimizers: Sequence[Optimizer], optimizer: int, group: int) -> str:
    """Return the name of a parameter group."""
    several = f"optimizer {optimizer}, " if len(optimizers) > 1 else ""
    return f"{several}group {group}"


def describe_nonfinite(gradients: Iterable[tuple[str, Tensor | None]]) -> str:
    """List the parameters whose gradients hold NaN or infinity, with how many. Host sync.

    Args:
        gradients: Names of parameters, and their gradients.
    """
    found = []
    for name, gradient in gradients:
        if gradient is not None:
            values = gradient._values() if gradient.is_sparse else gradient
            count = int(values.numel() - torch.isfinite(values).sum())
            if count:
                found.append(f"{name} ({count} of {values.numel()} elements)")
    return joined(found)


def joined(nonfinite: Sequence[str]) -> str:
    """Join what there is to say of parameters that are not finite."""
    if not nonfinite:
        return "none by itself: the sum of their powers exceeds the range of float64"
    more = len(nonfinite) - MOST_NAMED
    return ", ".join(nonfinite[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
