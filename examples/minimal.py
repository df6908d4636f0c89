"""Clip the gradients of a training loop and log their norms: python examples/minimal.py [LOGS]."""

import sys

import torch
from torch import nn

from gradclip import GradientClipper


def main(logs: str = "runs/minimal") -> None:
    """Train on data with a few bad labels."""
    torch.manual_seed(0)
    inputs = torch.randn(1024, 10)
    targets = inputs.sum(dim=1, keepdim=True)
    targets[::256] *= 100  # four bad labels, with gradients that are far too large

    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = GradientClipper(optimizer, 1.0, log=logs)  # the only line that clipping adds

    for step in range(200):
        batch = torch.randint(len(inputs), (32,))
        loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # clips first
        if step % 20 == 0:
            before, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
            print(f"step {step:3}  loss {loss:8.2f}  norm before {before:6.2f}, after {after:.2f}")

    print(f"{clipper.clip_rate():.0%} of the steps were clipped.")
    clipper.close()
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
