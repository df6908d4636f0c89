"""An optimizer with one weight whose gradient has norm 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def optimizer_of(
    kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any
) -> torch.optim.Optimizer:
    """Return an optimizer of one weight (1, 1) with the gradient (3, 4)."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([3.0, 4.0])
    return kind([weight], lr=1.0, **options)


def gradient(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the gradient of the first weight."""
    return optimizer.param_groups[0]["params"][0].grad.tolist()
