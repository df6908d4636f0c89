"""Two optimizers for one model, clipped by one joint norm.

Muon updates the matrices of the hidden layers and AdamW everything else. With one clipper each,
every spike would change the balance between them. One clipper for both scales all gradients of a
backward pass by one factor. A GradScaler is passed to the clipper as ``grad_scaler=``. The two
losses of a GAN need two clippers.

    python examples/two_optimizers.py [LOGS]
"""

import sys

import torch
from torch import nn

from gradclip import GradientClipper


def main(logs: str = "runs/two_optimizers") -> None:
    """Train a small classifier of sequences."""
    torch.manual_seed(0)
    tokens = torch.randint(32, (2048, 12))
    targets = tokens.sum(dim=1) % 4

    model = nn.Sequential(
        nn.Embedding(32, 16), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 4)
    )
    hidden = model[2].weight
    others = [parameter for parameter in model.parameters() if parameter is not hidden]
    for_matrices = getattr(torch.optim, "Muon", torch.optim.SGD)  # Muon: torch 2.9 and newer
    optimizers = [for_matrices([hidden], lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    clipper = GradientClipper(optimizers, 1.0, log=logs)

    for step in range(100):
        batch = torch.randint(len(tokens), (64,))
        loss = nn.functional.cross_entropy(model(tokens[batch]), targets[batch])
        clipper.zero_grad()  # of both optimizers
        loss.backward()
        for optimizer in optimizers:  # or clipper.step()
            optimizer.step()  # the first step clips the gradients of both
        if step % 20 == 0:
            norm, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
            print(f"step {step:2}  loss {loss:.3f}  norm before {norm:.3f}, after {after:.3f}")

    print(f"{clipper.steps} steps with {clipper.clip_rate():.0%} clipped: {clipper}")
    clipper.close()
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
