"""A small network that is trained by frameworks, and the same training by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from gradclip import GradientClipper, MemorySink
from gradclip.thresholds import Percentile
from tests.support.twins import clip_by_hand

THRESHOLD = 1.0
BATCHES, SIZE = 8, 4
WARNINGS = (
    ".*does not have many workers",
    "The number of training batches .* is smaller than the log",
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "(Experiment logs|Checkpoint) directory .* exists and is not empty",
    # The Trainer's data loader asks for pinned memory, also where there is no accelerator.
    "'pin_memory' argument is set as true",
)
IGNORED = [pytest.mark.filterwarnings(f"ignore:{text}") for text in WARNINGS]
NUMBERS = {
    f"grad_norm/{name}"
    for name in ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
}
"""Names that a framework logs."""
SCALES = (0.1, 3.0, 0.3, 30.0)
"""Factors of the losses of batches, in turn: some gradients are too long and some are not."""


def net_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def momentum(net: nn.Module) -> Optimizer:
    return SGD(net.parameters(), lr=0.05, momentum=0.9)


def overflowing_scaler() -> torch.amp.GradScaler:
    """Return a scaler by powers of 2, which change no bits; its first scale is too large."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)


def rule_of() -> Percentile:
    return Percentile(60, window=6)


def loader(size: int = SIZE) -> DataLoader[Any]:
    """Return batches of inputs, targets, and the factors of the losses."""
    rows = torch.randn(BATCHES * SIZE, 9, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor(SCALES).repeat_interleave(SIZE).repeat(BATCHES // len(SCALES))
    return DataLoader(TensorDataset(rows[:, :6], rows[:, 6:], scales), batch_size=size)


def loss_of(net: nn.Module, batch: Any) -> Tensor:
    inputs, targets, scales = batch
    return ((net(inputs) - targets).square().mean(1) * scales).mean()


def by_hand(
    *,
    epochs: int = 1,
    accumulate: int = 1,
    threshold: float = THRESHOLD,
    bf16: bool = False,
    before: float | None = None,
    skipped: int | None = None,
) -> tuple[nn.Module, list[float]]:
    """Train without a framework; return the network, and the norms before each clipping.

    Args:
        accumulate: Batches for each step.
        before: Threshold of a clipping before that, for which norms are not returned.
        skipped: Batch whose gradients are dropped.
    """
    net = net_of()
    optimizer, norms, batches = momentum(net), [], [*loader()]
    for index, batch in enumerate(batches * epochs):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = loss_of(net, batch)
        (loss / accumulate).backward()
        place = index % BATCHES + 1
        if place % accumulate and place < BATCHES:
            continue
        if index == skipped:
            optimizer.zero_grad()
            continue
        if before is not None:
            nn.utils.clip_grad_norm_(net.parameters(), before)
        norms.append(clip_by_hand(optimizer, threshold=threshold))
        optimizer.step()
        optimizer.zero_grad()
    return net, norms


def norms_of(sink: MemorySink) -> list[float]:
    return [step.norm for step in sink.steps]


def values(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def assert_close(net: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(values(net), values(expected), rtol=1e-5, atol=1e-6)


def assert_unlike(net: nn.Module, other: nn.Module) -> None:
    assert (values(net) - values(other)).abs().max() > 1e-3


def assert_free(optimizer: Any) -> None:
    """Assert that no clipper holds an optimizer any more."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    GradientClipper(optimizer, 1.0).close()
