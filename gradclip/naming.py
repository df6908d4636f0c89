"""Names of parameters, for people who have to find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOST_NAMED = 10


def parameter_names(
    groups: Sequence[Mapping[str, Any]], model: nn.Module | None
) -> list[tuple[str, Tensor]]:
    """Return every parameter of an optimizer once, with its name.

    The name is the model's, else the one that the optimizer was given, else the place in the
    optimizer's groups.
    """
    known = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    named: dict[int, tuple[str, Tensor]] = {}
    for number, group in enumerate(groups):
        given = group.get("param_names") or [
            f"group {number}, parameter {place}" for place in range(len(group["params"]))
        ]
        for name, parameter in zip(given, group["params"], strict=True):
            named.setdefault(id(parameter), (known.get(id(parameter), name), parameter))
    return list(named.values())


def describe_nonfinite(named: Sequence[tuple[str, Tensor]]) -> str:
    """List the parameters whose gradients hold NaN or infinity, with how many. Host sync."""
    found = []
    for name, parameter in named:
        gradient = parameter.grad
        if gradient is not None:
            values = gradient._values() if gradient.is_sparse else gradient
            count = int(values.numel() - torch.isfinite(values).sum())
            if count:
                found.append(f"{name} ({count} of {values.numel()} elements)")
    if not found:
        return "none by itself: the sum of their powers exceeds the range of float64"
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return ", ".join(found[:MOST_NAMED]) + more
