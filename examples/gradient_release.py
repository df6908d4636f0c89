"""Steps inside backward: each parameter is updated, and its gradient freed, as soon as it is there.

The recipe is that of torch's tutorial "How to save memory by fusing the optimizer step into the
backward pass": an optimizer for each parameter, stepped by a hook. No norm over all gradients is
known then, but each parameter, or each unit, can have its own. One clipper serves all optimizers
and makes one record of each backward pass.

    python examples/gradient_release.py [LOGS]
"""

import sys

import torch
from torch import nn

from gradclip import GradientClipper


def main(logs: str = "runs/gradient_release") -> None:
    """Train on data with a few bad labels."""
    torch.manual_seed(0)
    inputs = torch.randn(1024, 10)
    targets = inputs.sum(dim=1, keepdim=True)
    targets[::256] *= 100  # four bad labels, with gradients that are far too large

    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizers = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}
    clipper = GradientClipper([*optimizers.values()], 0.5, scope="parameter", model=model, log=logs)

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()  # clips first
        optimizers[parameter].zero_grad()  # frees the gradient

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)

    for index in range(200):
        batch = torch.randint(len(inputs), (32,))
        loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
        loss.backward()  # takes the step
        if index % 40 == 0:
            norms = zip(clipper.labels, clipper.last.norm.tolist(), strict=True)
            shown = ", ".join(f"{name} {norm:.2f}" for name, norm in norms)
            print(f"step {index:3}  loss {loss:8.2f}  norms {shown}")

    print(f"{clipper.steps} steps, and {clipper.clip_rate():.0%} of the norms were clipped.")
    clipper.close()
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
