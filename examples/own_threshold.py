"""A rule of your own for the threshold: python examples/own_threshold.py [LOGS].

A rule defines its state for each norm, its thresholds, and what it learns from a step. Its base
class places the state on the device, keeps invalid norms out of it, saves it and loads it.
"""

import sys

import torch
from torch import nn

from gradclip import GradientClipper
from gradclip.thresholds import AdaptiveThreshold


class TwiceTheAverage(AdaptiveThreshold):
    """Allows twice the moving average of the clipped norms."""

    def fresh(self, count, device, dtype):
        """Return one average for each norm, 0 before the first step."""
        return {"average": torch.zeros(count, device=device, dtype=dtype)}

    def limits(self, norms, context):
        """Return twice the average; infinity at the first step."""
        average = self.state["average"]
        return torch.where(average > 0, 2 * average, torch.inf)

    def learn(self, norms, clipped_norms, observed):
        """Move the average towards the clipped norm, all the way at the first step."""
        average = self.state["average"]
        moved = 0.95 * average + 0.05 * clipped_norms
        self.put(observed, average=torch.where(average > 0, moved, clipped_norms))


def main(logs: str = "runs/own_threshold") -> None:
    """Train on data with a few bad labels."""
    torch.manual_seed(0)
    inputs = torch.randn(1024, 10)
    targets = inputs.sum(dim=1, keepdim=True)
    targets[::256] *= 100  # four bad labels, with gradients that are far too large

    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = GradientClipper(optimizer, TwiceTheAverage(floor=0.5), log=logs)

    for step in range(200):
        batch = torch.randint(len(inputs), (32,))
        loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            norm, threshold = clipper.last.norm.item(), clipper.last.threshold.item()
            print(f"step {step:3}  loss {loss:8.2f}  norm {norm:6.2f}, threshold {threshold:.2f}")

    print(f"{clipper.clip_rate():.0%} of the steps were clipped by {clipper}")
    clipper.close()
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
