"""Regression whose targets have noise with heavy tails, on scikit-learn's diabetes data."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks.experiments.without_tuning.task import Training, seeded

BATCH = 16
FREEDOM = 1.3
"""Degrees of freedom of Student's t-distribution, which then has no variance."""


@functools.cache
def diabetes() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return standardised inputs and targets for training, and those held out, each third one."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    inputs, targets = (torch.tensor(each, dtype=torch.float32) for each in (data.data, data.target))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = ((targets - targets.mean()) / targets.std()).unsqueeze(1)
    held_out = torch.arange(len(targets)) % 3 == 0
    return inputs[~held_out], targets[~held_out], inputs[held_out], targets[held_out]


def training(rate: float, steps: int, seed: int) -> Training:
    """Return a training by SGD on squared errors; each use of a target has new noise."""
    inputs, targets, held_inputs, held_targets = diabetes()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(targets), (steps, BATCH), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        noise = torch.distributions.StudentT(FREEDOM).sample((steps, BATCH, 1))
    model = seeded(lambda: nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1)), seed)

    @torch.no_grad()
    def score() -> float:
        return F.mse_loss(model(held_inputs), held_targets).item()

    return Training(
        model,
        SGD(model.parameters(), lr=rate),
        lambda step: F.mse_loss(model(inputs[chosen[step]]), targets[chosen[step]] + noise[step]),
        score,
    )
