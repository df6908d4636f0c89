"""Modules and trainers of Lightning."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from gradclip import MemorySink
from tests.support.curves import curves_in
from tests.support.reference import gradient_norm
from tests.support.trainings import BATCHES, assert_free, loader, loss_of, momentum, net_of


def regression(package: Any = pl, **overrides: Any) -> Any:
    """Return a module whose attributes or methods may be overridden."""

    class Regression(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net_of()
            self.after: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            return momentum(self.net)

        def on_train_batch_end(self, *_: Any) -> None:
            self.after.append(gradient_norm(self.net.parameters()))

    return type("Regression", (Regression,), overrides)()


def evaluated(package: Any = pl, **overrides: Any) -> Any:
    """Return a module that can also be evaluated."""
    evaluations = dict.fromkeys(("validation_step", "test_step"), lambda *_: None)
    return regression(package, **evaluations, **overrides)


def manual_steps(**overrides: Any) -> dict[str, Any]:
    """Return overrides for steps by hand, with all optimizers after one backward."""

    def step(self: Any, batch: Any, index: int) -> None:
        self.zero_grad()
        self.manual_backward(loss_of(self.net, batch))
        optimizers = self.optimizers()
        if self.limit:
            self.clip_gradients(optimizers, gradient_clip_val=self.limit)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()

    own = {"automatic_optimization": False, "training_step": step, "limit": None}
    return own | overrides


def stepping(**overrides: Any) -> Any:
    return regression(**manual_steps(**overrides))


def halves() -> Any:
    """Return a module whose loss two optimizers have in common."""
    parts = {"configure_optimizers": lambda self: [momentum(self.net[i]) for i in (0, 2)]}
    return stepping(**parts)


def replacing(hook: str, step: int) -> Any:
    """Return a callback that has other optimizers made, at a hook after some steps."""

    def replace(trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            trainer.strategy.setup_optimizers(trainer)

    return pl.callbacks.LambdaCallback(**{hook: replace})


class Adversaries(nn.Module):
    """Two networks with a loss each, the second of which has much the larger gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = net_of(1), net_of(2)

    def losses(self, batch: Any) -> Iterator[Tensor]:
        yield loss_of(self.generator, batch) + 0.1 * self.critic(batch[0]).mean()
        yield 5 * loss_of(self.critic, batch)

    def optimizers_of(self) -> list[Optimizer]:
        return [momentum(self.generator), momentum(self.critic)]


def adversarial(step_with_closure: bool = False) -> Any:
    def step(self: Any, batch: Any, index: int) -> None:
        for optimizer, loss in zip(self.optimizers(), self.nets.losses(batch), strict=True):

            def closure(optimizer: Any = optimizer, loss: Tensor = loss) -> None:
                optimizer.zero_grad()
                self.manual_backward(loss)

            if step_with_closure:
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()

    nets = Adversaries()
    configure = {"configure_optimizers": lambda self: nets.optimizers_of()}
    return stepping(training_step=step, nets=nets, **configure)


def precision_of(scaler: Any) -> Any:
    """Return a precision that scales as in float16, and computes in float32."""
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.forward_context = torch.enable_grad
    return precision


def trainer_of(*callbacks: Any, package: Any = pl, **options: Any) -> Any:
    extras = ("checkpointing", "progress_bar", "model_summary")
    quiet = {"logger": False, "max_epochs": 1} | {f"enable_{extra}": False for extra in extras}
    given = callbacks[0] if len(callbacks) == 1 else [*callbacks]
    return package.Trainer(accelerator="cpu", callbacks=given, **{**quiet, **options})


def fit(module: Any, *callbacks: Any, resume: Any = None, **options: Any) -> Any:
    """Fit a module with a trainer, which is returned, and leaves no optimizer attached."""
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, loader(), ckpt_path=resume)
    for optimizer in trainer.optimizers:
        assert_free(optimizer)
    return trainer


def numbers_of(sink: MemorySink) -> list[tuple[float, ...]]:
    return [(s.step, s.norm, s.clipped_norm, s.threshold, s.clip_rate) for s in sink.steps]


def in_turn(self: Any, batch: Any, index: int) -> Tensor:
    """Train on the batch of the step: a loader that is resumed within an epoch begins again."""
    return loss_of(self.net, [*loader()][self.trainer.global_step % BATCHES])


def scalars_in(folder: Any) -> dict[str, list[tuple[int, float]]]:
    curves = curves_in(folder).items() if Path(folder).exists() else ()
    # Of several files the order is that of their names, whose last number has no leading zeros.
    points = {tag: sorted((p.step, p.value) for p in points) for tag, points in curves}
    return {tag: curve for tag, curve in points.items() if tag.startswith("grad_norm")}


def rows_in(folder: Any) -> list[dict[str, str]]:
    path = Path(folder) / "metrics.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return [row for row in rows if row.get("grad_norm/pre")]
