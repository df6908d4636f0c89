"""A training whose steps a CUDA graph may capture and replay, with a tape in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradclip import GradientClipper, MemorySink

WARM_UP = 3


class GraphTraining:
    """A small network, whose batches are copied into one tensor, as a graph needs it."""

    def __init__(
        self, max_norm: Any, *, device: str = "cpu", fused: bool = True, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.1, fused=fused, capturable=device == "cuda"
        )
        self.batch = torch.zeros(5, 4, device=device)
        self.sink = MemorySink()
        self.clipper = GradientClipper(self.optimizer, max_norm, log=self.sink, **options)
        self.gives_loss = False

    def step(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(self.batch).square().mean()
        loss.backward()
        if self.gives_loss:
            self.clipper.loss = loss
        self.optimizer.step()

    def eager(self, given: Sequence[Tensor]) -> GraphTraining:
        for batch in given:
            self.batch.copy_(batch)
            self.step()
        return self

    def replayed(self, given: Sequence[Tensor], tape: Any, captured: Any) -> GraphTraining:
        """Take some steps, capture one, which the tape runs at once, and replay it."""
        self.eager(given[:WARM_UP])
        self.batch.copy_(given[WARM_UP])
        with captured(), tape:
            self.step()
        for batch in given[WARM_UP + 1 :]:
            self.batch.copy_(batch)
            tape.replay()
        return self

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def field(self, name: str) -> list[Any]:
        self.clipper.flush()
        return [getattr(step, name) for step in self.sink.steps]


def replay_batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, generator=generator) * (1 + index % 4) for index in range(count)]
