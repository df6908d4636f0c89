"""Whole training steps of GPT-2, clipped in several ways and not at all."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradclip
from benchmarks.common.models import GPT2
from benchmarks.common.timing import interleaved_medians
from benchmarks.cuda.rivals import MAX_NORM
from benchmarks.cuda.timing import by_clock_to_the_end

STEPS = 5
"""Steps that are timed together: within them the host may run ahead of the device."""
FULL: dict[str, Any] = {"model": {}, "batch": 8, "length": 1024}
TOY: dict[str, Any] = {
    "model": {"layers": 1, "wide": 8, "heads": 2, "vocabulary": 32, "positions": 16},
    "batch": 2,
    "length": 16,
}


class Training:
    """A model and a batch, trained with any optimizer and clipping."""

    def __init__(self, device: torch.device, model: dict[str, int], batch: int, length: int):
        self.model = GPT2(**model).to(device)
        vocabulary = self.model.tokens.num_embeddings
        self._tokens = torch.randint(vocabulary, (batch, length + 1), device=device)
        self._autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer of the model."""
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def run(
        self, optimizer: torch.optim.Optimizer, clip: Callable[[], object], finish: Callable
    ) -> None:
        """Take `STEPS` steps."""
        for _ in range(STEPS):
            optimizer.zero_grad()
            with self._autocast():
                logits = self.model(self._tokens[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
            loss.backward()
            clip()
            optimizer.step()
        finish()


def measure_training(seconds: float, device: torch.device, size: dict[str, Any]) -> dict[str, Any]:
    """Return the time of a training step in milliseconds, and the share of clipped steps.

    Forward and backward run in bfloat16 autocast; AdamW is fused; weights and gradients are
    float32. The clipper's log is flushed within the timed part, after every `STEPS` steps. The
    writer used by hand has a thread of its own, which decides when to write.
    """
    # Not at the top: without TensorBoard the other benchmarks still run.
    from torch.utils.tensorboard import SummaryWriter

    training = Training(device, **size)
    parameters = [*training.model.parameters()]
    plain, hooked = training.optimizer(), training.optimizer()
    numbers = itertools.count()

    def clip() -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    def by_hand() -> None:
        writer.add_scalar("norm", clip().item(), next(numbers))

    def nothing() -> None:
        pass

    with (
        tempfile.TemporaryDirectory() as folder,
        SummaryWriter(f"{folder}/torch") as writer,
        gradclip.GradientClipper(hooked, MAX_NORM, log=f"{folder}/gradclip") as clipper,
    ):
        run = training.run
        rivals = {
            "no clipping": lambda: run(plain, nothing, nothing),
            "torch": lambda: run(plain, clip, nothing),
            "torch and add_scalar": lambda: run(plain, by_hand, nothing),
            "GradientClipper with log": lambda: run(hooked, nothing, clipper.flush),
        }
        timer = functools.partial(by_clock_to_the_end, device=device)
        medians = interleaved_medians(rivals, nothing, seconds, timer=timer)
        clipped = clipper.clip_rate()
    return {
        "ms": {name: taken / STEPS * 1e3 for name, taken in medians.items()},
        "overhead": {name: taken / medians["no clipping"] - 1 for name, taken in medians.items()},
        "clipped": clipped,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "batch": size["batch"],
        "length": size["length"],
    }
