"""Advice for trainings of real models, and the same trainings with its line of code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from gradclip import GradientClipper, JsonlSink
from gradclip.cli.demo.training import one_thread
from tests.support.report import reported


@dataclass(frozen=True)
class Task:
    """A regression, the same at each training but for the clipper."""

    steps: int
    hidden: int = 32
    rate: float = 0.05
    noise: float = 0.5
    bad: tuple[int, ...] = ()
    """Steps whose targets are wrong."""
    times: float = 1.0
    """Factor between the wrong targets and the right ones."""

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(16, 1, generator=generator)
        while True:
            inputs = torch.randn(32, 16, generator=generator)
            targets = torch.tanh(inputs @ weights / 4) * 2 if self.noise else inputs @ weights
            yield inputs, targets + self.noise * torch.randn(32, 1, generator=generator)


class Trained:
    """A training: its losses, the steps it clipped, and the advice for its log."""

    def __init__(self, task: Task, line: str, log: Any) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, task.hidden), nn.ReLU(), nn.Linear(task.hidden, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=task.rate)
        logging = partial(GradientClipper, log=JsonlSink(log))
        batches, losses = task.batches(), []
        with eval(line, {"GradientClipper": logging, "optimizer": optimizer}):
            for step, (inputs, targets) in enumerate(islice(batches, task.steps)):
                loss = mse_loss(model(inputs), targets * (task.times if step in task.bad else 1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        with torch.no_grad():  # the batches that follow are for testing
            tested = [mse_loss(model(x), y).item() for x, y in islice(batches, 20)]
        self.first_loss, self.last_loss = losses[0], float(np.mean(tested))
        [run] = reported(log)
        self.advice = run["advice"]
        rows = map(json.loads, log.read_text().splitlines())
        self.clipped = {row["step"] for row in rows if (row["coefficient"] or 1) < 1}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Train a task with a line of code, each pair once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    @one_thread()  # such small models are slower with two
    def train(task: Task, line: str = "GradientClipper(optimizer, None)") -> Trained:
        return Trained(task, line, folder / f"{len([*folder.iterdir()])}.jsonl")

    return train


QUIET = Task(600)
SPIKY = replace(QUIET, bad=(150, 300, 450, 590), times=10.0)
EXPLODING = replace(QUIET, bad=(300,), times=1e4)
"""One step throws the parameters so far off that no later one brings them back."""
AT_ONCE = Task(300, hidden=64, rate=0.5, noise=0.0)


def test_spiky(train):
    """With its line the training is clipped at its spikes and ends better."""
    first = train(SPIKY)
    assert first.advice["kind"] == "spiky"
    again = train(SPIKY, first.advice["line"])
    assert again.clipped >= {*SPIKY.bad}
    assert len(again.clipped - {*SPIKY.bad}) < 0.02 * SPIKY.steps
    assert again.last_loss < 0.95 * first.last_loss
    assert again.last_loss < 1.1 * train(QUIET).last_loss


def test_exploding(train):
    """The line clips the explosion, hardly anything else, and the training learns."""
    first = train(EXPLODING)
    assert first.advice["kind"] == "exploding"
    assert not math.isfinite(first.last_loss)
    again = train(EXPLODING, first.advice["line"])
    assert 300 in again.clipped
    assert len(again.clipped - {300}) < 0.05 * EXPLODING.steps
    assert again.last_loss < 0.5 * again.first_loss


def test_exploding_before_a_usual_norm_is_known(train):
    first = train(AT_ONCE)
    assert not math.isfinite(first.last_loss)
    assert first.advice["kind"] == "exploding"
    assert "too few to know the usual norm" in first.advice["reason"]
    again = train(AT_ONCE, first.advice["line"])
    assert again.last_loss < 0.8 * again.first_loss
