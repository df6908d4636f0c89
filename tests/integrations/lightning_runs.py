"""Trainings with Lightning, and the same by hand."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from gradclip import MemorySink
from gradclip.thresholds import Percentile

IGNORED = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the log"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

THRESHOLD = 1.0
BATCHES, SIZE = 8, 4
SCALES = (0.1, 3.0, 0.3, 30.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""


def net_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(BATCHES, SIZE, 9, generator=generator)
    return [(batch[:, :6], batch[:, 6:]) for batch in found]


def data() -> DataLoader[Any]:
    inputs, targets = (torch.cat(each) for each in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(inputs, targets), batch_size=SIZE)


def momentum(net: nn.Module) -> Optimizer:
    return SGD(net.parameters(), lr=0.05, momentum=0.9)


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean() * SCALES[index % len(SCALES)]


def norm64(net: nn.Module) -> float:
    squares = [
        p.grad.double().square().sum().item() for p in net.parameters() if p.grad is not None
    ]
    return math.sqrt(sum(squares))


def values(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(values(found), values(expected), rtol=1e-5, atol=1e-6)


def assert_unlike(found: nn.Module, other: nn.Module) -> None:
    assert (values(found) - values(other)).abs().max() > 1e-3


def by_hand(
    epochs: int = 1,
    accumulate: int = 1,
    clip: bool = True,
    optimizer_of: Callable[[nn.Module], Optimizer] = momentum,
) -> tuple[nn.Module, list[float]]:
    """Train with torch's own clipping; return the model and the norms before it."""
    net = net_of()
    optimizer, norms = optimizer_of(net), []
    for _ in range(epochs):
        for index, batch in enumerate(batches()):
            (loss_of(net, batch, index) / accumulate).backward()
            if (index + 1) % accumulate and index + 1 < BATCHES:
                continue
            norms.append(norm64(net))
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), THRESHOLD)
            optimizer.step()
            optimizer.zero_grad()
    return net, norms


def regression(package: Any = pl, **overrides: Any) -> Any:
    """Return a module whose attributes or methods may be overridden."""

    class Regression(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net_of()
            self.after: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.net, batch, index)

        def configure_optimizers(self) -> Any:
            return momentum(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            self.after.append(norm64(self.net))

    return type("Regression", (Regression,), overrides)()


def evaluated(package: Any = pl) -> Any:
    """Return one that can also be evaluated."""

    def evaluate(self: Any, batch: Any, index: int) -> None:
        loss_of(self.net, batch, index)

    return regression(package, validation_step=evaluate, test_step=evaluate)


def trainer_of(*callbacks: Any, package: Any = pl, **options: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return package.Trainer(accelerator="cpu", callbacks=[*callbacks], **{**quiet, **options})


def norms_of(sink: MemorySink) -> list[float]:
    return [step.norm for step in sink.steps]


def numbers_of(sink: MemorySink) -> list[tuple[float, ...]]:
    return [(s.step, s.norm, s.clipped_norm, s.threshold, s.clip_rate) for s in sink.steps]


def rule_of() -> Percentile:
    return Percentile(60, window=6)


def checkpoint_of(path: Path, callbacks: list[Any], module: Any, **options: Any) -> str:
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, data())
    trainer.save_checkpoint(path)
    return str(path)


def in_turn(self: Any, batch: Any, index: int) -> Tensor:
    """Train on what the step says: a loader that is resumed within an epoch begins again."""
    index = self.trainer.global_step % BATCHES
    return loss_of(self.net, batches()[index], index)


def scalars_in(folder: Any) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in reader.Tags()["scalars"] if tag.startswith("grad_norm")]
    return {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in tags}


def rows_in(folder: Any) -> list[dict[str, str]]:
    with (Path(folder) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row.get("grad_norm/pre")]


def adversarial(step_with_closure: bool = False) -> Any:
    class Adversarial(pl.LightningModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.nets = Adversaries()

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer, loss in zip(
                self.optimizers(), self.nets.losses(batch, index), strict=True
            ):

                def closure(optimizer: Any = optimizer, loss: Tensor = loss) -> None:
                    optimizer.zero_grad()
                    self.manual_backward(loss)

                if step_with_closure:
                    optimizer.step(closure=closure)
                else:
                    closure()
                    optimizer.step()

        def configure_optimizers(self) -> list[Optimizer]:
            return self.nets.optimizers_of()

    return Adversarial()


def halves() -> Any:
    """Return a module whose loss two optimizers have in common."""

    class Halves(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = net_of()

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss_of(self.net, batch, index))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[Optimizer]:
            return [momentum(self.net[0]), momentum(self.net[2])]

    return Halves()


class Adversaries(nn.Module):
    """Two networks with a loss each, the second of which has much the larger gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = net_of(1), net_of(2)

    def losses(self, batch: Any, index: int) -> Iterator[Tensor]:
        yield loss_of(self.generator, batch, index) + 0.1 * self.critic(batch[0]).mean()
        yield 5 * loss_of(self.critic, batch, index + 1)

    def optimizers_of(self) -> list[Optimizer]:
        return [momentum(self.generator), momentum(self.critic)]
