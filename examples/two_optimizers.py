"""Two optimizers for one model, one of which needs no clipping.

Muon updates the matrices of the hidden layers and AdamW everything else. Muon makes each gradient
orthogonal, so that its update does not depend on the gradient's scale: it needs no clipping, and in
a joint norm it would only push its gradients towards the 1e-7 that it adds to their norm
(https://github.com/NVIDIA/Megatron-LM/issues/5394). Its group therefore has the key ``max_norm``
with None, and AdamW's gradients alone share the norm. Optimizers of other kinds, such as SGD and
AdamW, may well share one. A GradScaler is passed to the clipper as ``grad_scaler=``. The two losses
of a GAN need two clippers.

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
    never_clipped = {"params": [hidden], "max_norm": None}
    optimizers = [for_matrices([never_clipped], lr=0.02), torch.optim.AdamW(others, lr=0.01)]
    clipper = GradientClipper(optimizers, 1.0, log=logs)

    for step in range(100):
        batch = torch.randint(len(tokens), (64,))
        loss = nn.functional.cross_entropy(model(tokens[batch]), targets[batch])
        clipper.zero_grad()  # of both optimizers
        loss.backward()
        for optimizer in optimizers:  # or clipper.step()
            optimizer.step()  # AdamW's gradients are clipped
        if step % 20 == 0:
            norm, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
            print(f"step {step:2}  loss {loss:.3f}  norm before {norm:.3f}, after {after:.3f}")

    print(f"{clipper.steps} steps with {clipper.clip_rate():.0%} clipped: {clipper}")
    clipper.close()
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
