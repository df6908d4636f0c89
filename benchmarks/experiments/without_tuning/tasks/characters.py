"""Recurrent networks and GPTs that learn the characters of real text, Python's help texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.common.models import GPT2
from benchmarks.common.text import pieces, split_text, spread_pieces
from benchmarks.experiments.without_tuning.task import Task, Training, seeded

EVALUATED = 256
"""Evenly spread pieces of the held-out text, whose mean loss is the score."""
HIDDEN, EMBEDDING, GAIN = 64, 8, 1.2
"""Sizes of a recurrent network, and the gain of its recurrent weights, which is the demo's."""


class Recurrent(nn.Module):
    """Embedding, recurrent network, linear layer, as in ``gradclip demo`` but smaller."""

    def __init__(self, cell: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        characters = split_text()[2]
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.recurrent = cell(EMBEDDING, HIDDEN, batch_first=True)
        for matrix in self.recurrent.get_parameter("weight_hh_l0").detach().split(HIDDEN):
            nn.init.orthogonal_(matrix, GAIN)
        self.head = nn.Linear(HIDDEN, characters)

    def forward(self, characters: Tensor) -> Tensor:
        """Return the scores of the next characters, of shape (batch, length, alphabet)."""
        scores: Tensor = self.head(self.recurrent(self.embedding(characters))[0])
        return scores


def training(
    model: Callable[[], nn.Module],
    optimizer: Callable[..., Optimizer],
    batch: int,
    length: int,
    corrupt_: Callable[[int, Sequence[Tensor]], None] | None,
    steps: int,
    seed: int,
) -> Training:
    """Return the training of a model of characters."""
    learned, held_out, _ = split_text()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(learned) - length, (steps, batch), generator=generator)
    evaluated = spread_pieces(held_out, EVALUATED, length)
    network = seeded(model, seed)

    def loss_of(characters: Tensor) -> Tensor:
        scores = network(characters[:, :-1])
        return F.cross_entropy(scores.flatten(0, 1), characters[:, 1:].flatten())

    @torch.no_grad()
    def score() -> float:
        return loss_of(evaluated).item()

    return Training(
        network,
        optimizer(network.parameters()),
        lambda step: loss_of(pieces(learned, starts[step], length)),
        score,
        corrupt_,
    )


CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": partial(nn.RNN, nonlinearity="tanh"),
    "relu": partial(nn.RNN, nonlinearity="relu"),
    "lstm": nn.LSTM,
    "gru": nn.GRU,
}


def recurrent(cell: str, rate: float, *, explosive: bool) -> Task:
    """Return the task of a recurrent network trained by SGD.

    Args:
        cell: Kind of network, a key of `CELLS`.
        rate: Learning rate.
        explosive: Whether this rate makes the training explode; part of the name.
    """
    steps, batch, length = 240, 16, 50
    return Task(
        f"{cell} {'explosive' if explosive else 'calm'}",
        f"characters, {cell} of {HIDDEN} units, SGD({rate:g})",
        steps,
        partial(
            training,
            partial(Recurrent, CELLS[cell]),
            partial(SGD, lr=rate),
            batch,
            length,
            None,
        ),
        chance=CHANCE,
        explosive=explosive,
    )


CHANCE = 3.4
"""Loss of the best guess that knows the frequencies of the characters alone, in nats."""


def gpt(
    name: str,
    rate: float,
    corrupt_: Callable[[int, Sequence[Tensor]], None] | None = None,
    *,
    explosive: bool = False,
) -> Task:
    """Return the task of a small GPT trained by AdamW.

    Args:
        name: Name of the task.
        rate: Learning rate.
        corrupt_: Corrupts the gradients of some steps; None for no corruption.
        explosive: Whether training without clipping is expected to fail.
    """
    steps, batch, length = 300, 8, 32
    return Task(
        name,
        f"characters, GPT of 2 layers, 32 wide, AdamW({rate:g})",
        steps,
        partial(
            training,
            lambda: GPT2(2, 32, 2, split_text()[2], length),
            partial(AdamW, lr=rate, betas=(0.9, 0.95), weight_decay=0.1),
            batch,
            length,
            corrupt_,
        ),
        chance=CHANCE,
        explosive=explosive,
    )


SPIKES = {40: 30.0, 100: 100.0, 101: 100.0, 160: 1e4, 200: float("nan"), 230: 1e3}
"""Factors of the gradients at some steps."""


def inject_(step: int, gradients: Sequence[Tensor]) -> None:
    """Multiply the gradients at the steps of `SPIKES`."""
    if step in SPIKES:
        torch._foreach_mul_(list(gradients), SPIKES[step])
