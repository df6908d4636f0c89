"""The adding problem: a recurrent network adds the two marked numbers of a long sequence.

Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from benchmarks.experiments.without_tuning.task import Training, seeded

LENGTH, BATCH, HIDDEN = 30, 32, 32
NOISE = 0.2
"""Standard deviation of what is added to each sum: without it the loss falls to almost 0, where a
ratio of two losses says little."""
EVALUATED = 1000


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences of numbers and marks, of shape (count, LENGTH, 2), and their sums."""
    numbers = torch.rand(count, LENGTH, generator=generator)
    half = LENGTH // 2
    first = torch.randint(half, (count, 1), generator=generator)
    second = torch.randint(half, LENGTH, (count, 1), generator=generator)
    marks = torch.zeros(count, LENGTH).scatter_(1, torch.cat((first, second), 1), 1.0)
    noise = NOISE * torch.randn(count, generator=generator)
    return torch.stack((numbers, marks), 2), (numbers * marks).sum(1) + noise


class Adder(nn.Module):
    """A GRU whose last state gives the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(2, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sums of sequences, shape (batch,)."""
        sums: Tensor = self.head(self.recurrent(inputs)[0][:, -1]).squeeze(1)
        return sums


def training(rate: float, steps: int, seed: int) -> Training:
    """Return a training by Adam."""
    generator = torch.Generator().manual_seed(seed)
    inputs, sums = sequences(steps * BATCH, generator)
    held_inputs, held_sums = sequences(EVALUATED, generator)
    model = seeded(Adder, seed)

    def loss(step: int) -> Tensor:
        batch = slice(step * BATCH, (step + 1) * BATCH)
        return F.mse_loss(model(inputs[batch]), sums[batch])

    @torch.no_grad()
    def score() -> float:
        return F.mse_loss(model(held_inputs), held_sums).item()

    return Training(model, Adam(model.parameters(), lr=rate), loss, score)
