"""Mixed precision and gradient accumulation, which need no option of the clipper.

GradScaler multiplies the loss so that small gradients survive half precision. The clipper always
measures and records the true norm: with a fused optimizer, whose gradients are still scaled at its
step, with any other optimizer, and with or without ``unscale_``. It does not count a step that
GradScaler skips because of an overflow. Accumulated gradients are clipped once, at the step.

    python examples/amp_accumulation.py [LOGS]
"""

import sys

import torch
from torch import nn

from gradclip import GradientClipper

MICRO_BATCHES, STEPS = 4, 60


def main(logs: str = "runs/amp_accumulation") -> None:
    """Train in half precision, with four micro-batches a step."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device == "cuda" else torch.bfloat16
    inputs = torch.randn(4096, 16, device=device)
    targets = inputs.sum(dim=1, keepdim=True)

    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    # The first scale is too high on purpose: the first steps overflow until the scale fits.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**127, growth_interval=20)
    clipper = GradientClipper(optimizer, 1.0, log=logs)

    for step in range(STEPS):
        for _ in range(MICRO_BATCHES):
            batch = torch.randint(len(inputs), (64,), device=device)
            with torch.autocast(device, dtype=half):
                loss = nn.functional.mse_loss(model(inputs[batch]), targets[batch])
            scaler.scale(loss / MICRO_BATCHES).backward()  # accumulates
        scaler.step(optimizer)  # clips first
        scaler.update()
        optimizer.zero_grad()
        if step % 10 == 9:
            norm, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
            print(f"scale {scaler.get_scale():8.2g}  norm before {norm:.3f}, after {after:.3f}")

    clipper.close()
    print(f"{STEPS - clipper.steps} of {STEPS} steps overflowed and were not counted;", end=" ")
    print(f"of the others {clipper.clip_rate():.0%} were clipped.")
    print(f"Curves: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
