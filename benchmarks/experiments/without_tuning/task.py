"""What a training of this experiment is: a model, its optimizer, its losses and its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DECAY = 0.25
"""Share of the steps, at the end, in which the learning rate falls linearly to 0."""


@dataclass
class Training:
    """One training that is ready to begin."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[int], Tensor]
    """Returns the loss of a step, given its index."""
    score: Callable[[], float]
    """Returns the final score on data that was held out; lower is better."""
    corrupt_: Callable[[int, Sequence[Tensor]], None] | None = None
    """Changes the gradients of a step in place before they are clipped; None for no change."""


@dataclass(frozen=True)
class Task:
    """A training to be repeated with several seeds and ways to clip."""

    name: str
    title: str
    """Data, model and optimizer."""
    steps: int
    make: Callable[[int, int], Training]
    """Returns a training of so many steps for a seed, which gives the same weights and data."""
    chance: float
    """Score of a model that learned nothing: a training that ends above it has diverged."""
    explosive: bool = False
    """True if training without clipping is expected to fail; decides nothing, only the table."""
    score: str = "loss"
    """What the score is, for the table."""


def share_of_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: 1, then falling linearly to 0."""
    return min(1.0, (steps - step) / (steps * DECAY))


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a module with weights from a seed; torch's global random state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()
