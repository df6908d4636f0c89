"""Small models of characters, corruptions of their gradients, and ways to clip them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

from benchmarks.common.models import GPT2
from benchmarks.common.text import pieces, split_text, spread_pieces
from benchmarks.experiments.spikes.outcomes import CLEAN, UNCLIPPED
from gradclip import GradientClipper
from gradclip.cli.demo.task import CharacterModel
from gradclip.thresholds import MedianDeviation, Percentile, ZScore

BATCH, LENGTH = 8, 32
EVALUATED = 400
"""Evenly spread pieces of the held-out text, whose mean loss is the final loss."""
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; then it falls to 0."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Learner:
    """A model with its optimizer, and the learning rates to try."""

    title: str
    make: Callable[[int], nn.Module]
    """Returns the model for an alphabet of some size."""
    optimizer: Callable[..., torch.optim.Optimizer]
    settings: dict[str, Any]
    """Options of the optimizer other than the learning rate."""
    rates: tuple[float, ...]

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.make(text()[2]).parameters())
        given = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{self.title}, {count:,} parameters, {self.optimizer.__name__}({given})"


LEARNERS = {
    "rnn": Learner(
        "tanh RNN of 128 units, as in `gradclip demo`",
        partial(CharacterModel, "rnn-tanh"),
        SGD,
        {"momentum": 0.9},
        (0.1, 0.03, 0.01),
    ),
    "gpt": Learner(
        "GPT of 2 layers, 32 wide, 2 heads",
        lambda characters: GPT2(2, 32, 2, characters, LENGTH),
        AdamW,
        {"betas": (0.9, 0.95), "weight_decay": 0.1},
        (0.01, 0.003, 0.001),
    ),
}


@dataclass(frozen=True)
class Corruption:
    """A change of the gradients, and the number of its steps."""

    factor: float = 1.0
    steps: int = 1
    nan: bool = False
    """Whether the first element of the first parameter becomes NaN."""

    def apply_(self, gradients: list[Tensor]) -> None:
        """Corrupt the gradients of a step in place."""
        if self.nan:
            gradients[0].view(-1)[0] = torch.nan
        torch._foreach_mul_(gradients, self.factor)


NONE = Corruption(steps=0)
CORRUPTIONS = {
    CLEAN: NONE,
    "1 step x 100": Corruption(100.0),
    "1 step x 10,000": Corruption(10_000.0),
    "1 NaN": Corruption(nan=True),
    "10 steps x 100": Corruption(100.0, steps=10),
}

ARMS: dict[str, Callable[[float], Options | None]] = {
    UNCLIPPED: lambda fixed: None,
    "fixed": lambda fixed: {"max_norm": fixed, "nonfinite": "zero"},
    "Percentile": lambda fixed: {"max_norm": Percentile(), "nonfinite": "zero"},
    "ZScore": lambda fixed: {"max_norm": ZScore(), "nonfinite": "zero"},
    "MedianDeviation": lambda fixed: {"max_norm": MedianDeviation(), "nonfinite": "zero"},
    "skip": lambda fixed: {"max_norm": MedianDeviation(), "exceed": "skip", "nonfinite": "skip"},
}
"""Options of the `GradientClipper` for a fixed threshold; None for no clipper."""


@functools.cache
def text() -> tuple[Tensor, Tensor, int]:
    """Return the characters for training, the held-out pieces, and the size of the alphabet."""
    training, held_out, characters = split_text()
    return training, spread_pieces(held_out, EVALUATED, LENGTH), characters


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of a character, in nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


class Training:
    """The training of one model.

    Args:
        learner: The model and its optimizer.
        rate: Highest learning rate.
        steps: Number of steps of the whole training.
        seed: Seed of the weights and of the batches.
        options: Options of the clipper; None for no clipper.
    """

    def __init__(
        self, learner: Learner, rate: float, steps: int, seed: int, options: Options | None
    ) -> None:
        self._text, self._held_out, characters = text()
        generator = torch.Generator().manual_seed(seed)
        count = len(self._text) - LENGTH
        self._starts = torch.randint(count, (steps, BATCH), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.model = learner.make(characters)
        self.parameters = [*self.model.parameters()]
        self.optimizer = learner.optimizer(self.parameters, lr=rate, **learner.settings)
        self.clipper = None if options is None else GradientClipper(self.optimizer, **options)
        self._rate, self._steps = rate, steps

    def advance(self, first: int, last: int, corruption: Corruption = NONE) -> None:
        """Take the steps from ``first`` up to, not including, ``last``; corrupt the first ones."""
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate * share_of_rate(step, self._steps)
            self.optimizer.zero_grad()
            loss_of(self.model, pieces(self._text, self._starts[step], LENGTH)).backward()
            if step - first < corruption.steps:
                corruption.apply_([p.grad for p in self.parameters if p.grad is not None])
            self.optimizer.step()  # clips first

    @torch.no_grad()
    def loss(self) -> float:
        """Return the loss on the held-out text."""
        return loss_of(self.model, self._held_out).item()

    def state(self) -> list[dict[str, Any]]:
        """Return a copy of the state of model, optimizer and clipper."""
        return copy.deepcopy([owner.state_dict() for owner in self._state_owners()])

    def load(self, state: list[dict[str, Any]]) -> None:
        """Restore a state."""
        for owner, saved in zip(self._state_owners(), copy.deepcopy(state), strict=True):
            owner.load_state_dict(saved)

    def counted(self) -> tuple[float, int]:
        """Return the share of clipped steps and the number of skipped ones."""
        if self.clipper is None:
            return 0.0, 0
        return self.clipper.clip_rate(), self.clipper.skipped

    def close(self) -> None:
        """Detach the clipper and write its log."""
        if self.clipper is not None:
            self.clipper.close()

    def _state_owners(self) -> Iterator[Any]:
        yield from (self.model, self.optimizer)
        if self.clipper is not None:
            yield self.clipper


def share_of_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: it rises linearly, then falls linearly to 0."""
    warm = max(1, round(steps * WARM_UP))
    return min((step + 1) / warm, (steps - step) / (steps - warm))


def code_of(arm: str) -> str:
    """Return the code of an arm."""
    options = ARMS[arm](1.0)
    if options is None:
        return "optimizer.step()"
    rule = options.pop("max_norm")
    rest = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"GradientClipper(optimizer, {'threshold' if rule == 1.0 else repr(rule)}{rest})"
