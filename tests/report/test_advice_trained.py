"""Advice for runs of real models, and what its line does when they are trained again with it."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradclip
from gradclip import GradientClipper, JsonlSink
from gradclip.cli.demo.task import read_text
from gradclip.report import Run, read_runs
from gradclip.report.advice import Advice, advised
from gradclip.report.printing import print_report
from gradclip.report.summary import summarized

SEED = 0
UNCLIPPED = "GradientClipper(optimizer, None)"

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Training:
    """A model and what it learns from, the same each time but for the clipper."""

    model: Callable[[], nn.Module]
    batches: Callable[[torch.Generator], Iterator[Batch]]
    """Endless; those that follow the steps are for testing."""
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    steps: int
    bad: tuple[int, ...] = ()
    """Steps whose targets are wrong."""
    times: float = 1.0
    """How many times as large as the true ones these targets are."""
    summed: int | None = None
    """A step whose loss is a sum over the batch of 32, not a mean."""
    idle: bool = False
    """Whether after each step comes one without gradients."""


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    run: Run
    first_loss: float
    last_loss: float
    """Of 20 batches that were not trained on."""
    parameters: list[Tensor]

    @property
    def advice(self) -> Advice:
        return advised(self.run, summarized(self.run))

    def clipped(self) -> set[int]:
        known = self.run.finite & (self.run.norms > self.run.thresholds)
        return {*self.run.steps[known].tolist()}


class Trainer:
    """Trains, each training once with each line."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._done: dict[Any, Trained] = {}

    def __call__(
        self, training: Training, line: str = UNCLIPPED, *, board: bool = False
    ) -> Trained:
        key = (training, line, board)
        if key not in self._done:
            name = str(len(self._done)) if board else f"{len(self._done)}.jsonl"
            self._done[key] = self._trained(training, line, self._directory / name)
        return self._done[key]

    def _trained(self, training: Training, line: str, log: Path) -> Trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = training.model()
        optimizer = training.optimizer(model.parameters())
        # The line as it is; only where it logs is added.
        logging = partial(GradientClipper, log=JsonlSink(log) if log.suffix else str(log))
        names = {"GradientClipper": logging, "gradclip": gradclip, "optimizer": optimizer}
        clipper = eval(line, names)
        losses = []
        batches = training.batches(torch.Generator().manual_seed(SEED))
        for step, (inputs, targets) in zip(range(training.steps), batches, strict=False):
            loss = training.loss(
                model(inputs), targets * training.times if step in training.bad else targets
            )
            optimizer.zero_grad()
            (loss * 32 if step == training.summed else loss).backward()
            optimizer.step()
            losses.append(loss.item())
            if training.idle:
                optimizer.zero_grad()
                optimizer.step()
        clipper.close()
        with torch.no_grad():
            held_out = [training.loss(model(x), y).item() for x, y in islice(batches, 20)]
        [run] = read_runs([log])
        parameters = [parameter.detach() for parameter in model.parameters()]
        return Trained(run, losses[0], float(np.mean(held_out)), parameters)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(tmp_path_factory.mktemp("runs"))


# What is trained


def noisy_function(generator: torch.Generator) -> Iterator[Batch]:
    weights = torch.randn(16, 1, generator=generator)
    while True:
        inputs = torch.randn(32, 16, generator=generator)
        noise = torch.randn(32, 1, generator=generator) / 2
        yield inputs, torch.tanh(inputs @ weights / 4) * 2 + noise


def linear_function(generator: torch.Generator) -> Iterator[Batch]:
    weights = torch.randn(16, 1, generator=generator)
    while True:
        inputs = torch.randn(32, 16, generator=generator)
        yield inputs, inputs @ weights


def noisy_linear_function(generator: torch.Generator) -> Iterator[Batch]:
    for inputs, targets in linear_function(generator):
        yield inputs, targets + torch.randn(32, 1, generator=generator)


def characters(generator: torch.Generator) -> Iterator[Batch]:
    text, offsets = read_text().characters, torch.arange(31)
    while True:
        starts = torch.randint(len(text) - 31, (8, 1), generator=generator)
        sequences = text[starts + offsets]
        yield sequences[:, :-1], sequences[:, 1:]


def perceptron(outputs: int, hidden: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Recurrent(nn.Module):
    """Predicts characters; a recurrent matrix with this gain and ReLU makes it explode."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(read_text().alphabet), 16)
        self.recurrent = nn.RNN(16, 32, nonlinearity="relu", batch_first=True)
        nn.init.orthogonal_(self.recurrent.weight_hh_l0, 1.4)
        self.head = nn.Linear(32, len(read_text().alphabet))

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.head(self.recurrent(self.embedding(inputs))[0])
        return scores.transpose(1, 2)


def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.SGD, lr=rate)


def adam(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(torch.optim.Adam, lr=rate)


QUIET = Training(partial(perceptron, 1), noisy_function, mse_loss, sgd(0.05), 600)
BAD = (150, 300, 450, 590)
SPIKY = replace(QUIET, bad=BAD, times=10.0)
DRIFTING = Training(partial(perceptron, 1), linear_function, mse_loss, adam(0.01), 600)
EXPLODING = replace(QUIET, bad=(300,), times=1e4)
"""One step throws the parameters so far off that no later one brings them back."""
FALLING = Training(partial(nn.Linear, 16, 1), noisy_linear_function, mse_loss, sgd(0.05), 600)
AT_ONCE = {
    "recurrent": Training(Recurrent, characters, cross_entropy, sgd(0.3), 60),
    "learning rate too high": Training(
        partial(perceptron, 1, 64), linear_function, mse_loss, sgd(0.5), 300
    ),
}


# Their advice


def test_runs_of_real_models_get_four_kinds_and_lines(train):
    runs = {
        "quiet": train(QUIET),
        "spiky": train(SPIKY, board=True),
        "drifting": train(DRIFTING),
        "exploding": train(EXPLODING),
    }
    assert {kind: trained.advice.kind for kind, trained in runs.items()} == {k: k for k in runs}
    assert len({trained.advice.line for trained in runs.values()}) == 4
    for trained in runs.values():
        stream = io.StringIO()
        print_report([trained.run], stream)
        assert stream.getvalue().endswith(f"\n    {trained.advice.line}\n")


def test_a_quiet_training_is_the_same_to_the_last_bit_with_its_line(train):
    first = train(QUIET)
    again = train(QUIET, first.advice.line)
    assert again.clipped() == set()
    assert all(map(torch.equal, first.parameters, again.parameters))


@pytest.mark.slow
def test_the_insurance_of_a_quiet_training_stops_a_corrupted_batch(train):
    first = train(QUIET)
    corrupted = replace(QUIET, bad=(400,), times=1e4)
    insured = train(corrupted, first.advice.line)
    assert insured.clipped() == {400}
    assert insured.last_loss < 1.1 * first.last_loss
    assert not train(corrupted).last_loss < 2 * first.last_loss


def test_a_spiky_training_is_clipped_at_its_spikes_and_ends_better(train):
    first = train(SPIKY, board=True)
    again = train(SPIKY, first.advice.line, board=True)
    assert again.clipped() >= {*BAD}
    assert len(again.clipped() - {*BAD}) < 0.02 * SPIKY.steps
    assert again.last_loss < 0.95 * first.last_loss
    assert again.last_loss < 1.1 * train(QUIET).last_loss


@pytest.mark.slow
def test_spikes_that_lift_the_level_for_good_are_named_and_clipped(train):
    training = replace(SPIKY, bad=BAD[:3], times=100.0, optimizer=adam(0.003))
    first = train(training)
    assert first.advice.kind == "drifting"
    assert "spikes of this run may have caused the drift" in first.advice.reason
    again = train(training, first.advice.line)
    assert again.clipped() >= {*BAD[:3]}
    assert len(again.clipped() - {*BAD[:3]}) < 0.02 * training.steps
    assert again.last_loss < 0.8 * first.last_loss


def test_the_line_for_a_drifting_training_fits_it_to_the_end(train):
    first = train(DRIFTING)
    assert summarized(first.run).trend < 0.25
    assert "spikes" not in first.advice.reason
    again = train(DRIFTING, first.advice.line)
    assert len(again.clipped()) < 0.05 * DRIFTING.steps
    assert again.last_loss < 1.1 * first.last_loss


@pytest.mark.slow
def test_the_line_for_a_drifting_training_stops_what_one_for_its_beginning_lets_pass(train):
    """A loss that is summed over its batch of 32, once, when norms are small."""
    late = replace(DRIFTING, summed=550)
    line = train(DRIFTING).advice.line
    fixed = f"GradientClipper(optimizer, {train(DRIFTING).run.norms[:100].max()})"
    assert 550 not in train(late, fixed).clipped()
    assert 550 in train(late, line).clipped()


def test_the_line_for_an_exploding_training_stops_the_explosion_alone(train):
    first = train(EXPLODING)
    assert not math.isfinite(first.last_loss)
    again = train(EXPLODING, first.advice.line)
    assert 300 in again.clipped()
    assert len(again.clipped() - {300}) < 0.05 * EXPLODING.steps
    assert again.last_loss < 0.5 * again.first_loss
    assert all(parameter.isfinite().all() for parameter in again.parameters)


@pytest.mark.parametrize("training", AT_ONCE.values(), ids=AT_ONCE)
def test_a_training_that_explodes_before_there_is_a_level_learns_with_its_line(training, train):
    first = train(training)
    assert not math.isfinite(first.last_loss)
    assert first.advice.kind == "exploding"
    assert "too few to know the usual" in first.advice.reason
    again = train(training, first.advice.line)
    assert again.run.finite.all()
    assert all(parameter.isfinite().all() for parameter in again.parameters)
    assert again.last_loss < 0.8 * again.first_loss


# What is no sign of anything


@pytest.mark.slow
def test_norms_that_fall_at_the_beginning_alone_are_no_drift(train):
    """The loss of linear regression falls until the noise is all that is left."""
    first = train(FALLING)
    assert first.run.norms[0] > 4 * np.median(first.run.norms[50:])
    assert first.advice.kind == "quiet"
    assert train(FALLING, first.advice.line).clipped() == set()


@pytest.mark.slow
def test_a_training_that_was_clipped_already_is_advised_by_its_norms_before(train):
    usual = np.quantile(train(QUIET).run.norms, 0.7)
    clipped = train(QUIET, f"GradientClipper(optimizer, {usual})")
    assert 0.2 < clipped.run.clip_rate < 0.5
    advice = clipped.advice
    assert advice.kind == "quiet"
    assert f"this training clipped {clipped.run.clip_rate:.2%} of its steps" in advice.reason
    assert train(QUIET, advice.line).clipped() == set()


@pytest.mark.slow
def test_steps_without_gradients_between_the_others_change_no_advice(train):
    first = train(replace(QUIET, idle=True))
    assert (first.run.norms[1::2] == 0).all()
    assert first.advice.kind == "quiet"
    again = train(replace(QUIET, idle=True), first.advice.line)
    assert all(map(torch.equal, first.parameters, again.parameters))


# What the thresholds would have clipped


@pytest.mark.slow
def test_a_threshold_clips_the_share_that_was_said_where_it_changes_no_norm(train):
    standing = replace(SPIKY, optimizer=sgd(0.0), steps=300)
    first = train(standing)
    shares = first.advice.shares
    assert sum(0 < share < 1 for share in shares.values()) >= 3
    for limit, share in shares.items():
        again = train(standing, f"GradientClipper(optimizer, {limit})")
        assert (again.run.norms == first.run.norms).all()
        assert again.run.clip_rate == share


@pytest.mark.slow
def test_a_threshold_that_clips_seldom_clips_nearly_the_share_that_was_said(train):
    shares = train(QUIET).advice.shares
    few = [limit for limit, share in shares.items() if 0 < share < 0.15]
    assert few
    for limit in few:
        again = train(QUIET, f"GradientClipper(optimizer, {limit})")
        assert again.run.clip_rate == pytest.approx(shares[limit], abs=0.02)
