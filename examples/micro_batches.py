"""Micro-batches that are clipped by themselves: python examples/micro_batches.py.

Some samples have a wrong label that is far off. One of them in a batch makes the accumulated
gradient point its own way, and clipping at the step keeps that direction: the other samples are
scaled down with it. Clipped micro-batch by micro-batch, it has a bounded share of the sum.

The table shows the loss on the same data with right labels. Other thresholds and seeds:
``python -m benchmarks.experiments.micro_batches``.
"""

import sys

import torch
from torch import nn

from gradclip import GradientClipper

MICRO_BATCHES, SIZE, STEPS = 8, 4, 150


def train(seed: int, threshold: float | None, *, by_micro_batch: bool) -> tuple[float, str]:
    """Return the loss on data with right labels at the end, and what was clipped."""
    torch.manual_seed(seed)
    inputs = torch.randn(4096, 16)
    targets = inputs @ torch.randn(16, 1) / 4
    noisy = torch.where(torch.rand(4096, 1) < 0.02, 30 * torch.randn(4096, 1), targets)

    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, threshold)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for rows in torch.randint(len(inputs), (MICRO_BATCHES, SIZE)):
            loss = nn.functional.mse_loss(model(inputs[rows]), noisy[rows]) / MICRO_BATCHES
            if by_micro_batch:
                with clipper.micro_batch(of=MICRO_BATCHES):
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()

    counts = clipper.micro_batches
    share = counts.clipped / counts.taken if by_micro_batch else clipper.clip_rate()
    clipped = f"{share:.0%} of the {'micro-batches' if by_micro_batch else 'steps'}"
    with torch.no_grad():
        return nn.functional.mse_loss(model(inputs), targets).item(), clipped


def main(seeds: str = "3") -> None:
    """Train with both ways of clipping, once for each seed."""
    print("seed  clipped at the step            clipped by micro-batch")
    for seed in range(int(seeds)):
        results = [train(seed, 1.0, by_micro_batch=each) for each in (False, True)]
        row = (f"loss {loss:.4f}, {clipped:<24}" for loss, clipped in results)
        print(f"{seed:4}  {'  '.join(row).rstrip()}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
