"""The two networks, each with the learning rates that it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch.optim import SGD

from benchmarks.common.text import split_text
from benchmarks.experiments.without_tuning.task import Task
from benchmarks.experiments.without_tuning.tasks.characters import CHANCE, gpt, training
from gradclip.cli.demo.task import BATCH, LENGTH, CharacterModel

STEPS = 150
"""Steps of the demo's network; the GPT takes those of its task."""


@dataclass(frozen=True)
class Network:
    """A network and its optimizer, to be trained at several learning rates."""

    rates: tuple[float, ...]
    """Learning rates over three decades around the usual one, half a decade apart, ascending."""
    task: Callable[[float], Task]
    """Returns the training at a learning rate."""


def demo(rate: float) -> Task:
    """Return the training of the demo's network at a learning rate."""
    return Task(
        "demo",
        f"tanh RNN of `gradclip demo`, {BATCH} pieces of {LENGTH} characters a step, SGD",
        STEPS,
        partial(
            training,
            lambda: CharacterModel("rnn-tanh", split_text()[2]),
            partial(SGD, lr=rate),
            BATCH,
            LENGTH,
            None,
        ),
        CHANCE,
    )


NETWORKS = {
    "tanh RNN": Network((0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), demo),
    "GPT": Network((1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), partial(gpt, "gpt")),
}
