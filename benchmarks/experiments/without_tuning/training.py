"""One training with one way to clip."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from benchmarks.experiments.without_tuning.arms import (
    OBSERVED,
    Clipping,
    advice_of,
    clipping,
)
from benchmarks.experiments.without_tuning.task import Task, Training, share_of_rate
from gradclip import GradientClipper, MemorySink
from gradclip.cli.demo.training import one_thread
from gradclip.report.advice import Advice

OBSERVED_SEED = 0
"""Seed of the run that the advice is taken from; no other run has it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one training."""

    task: str
    arm: str
    seed: int
    score: float
    """On held-out data, lower is better; NaN or infinite where the weights are."""
    clip_rate: float
    """Share of clipped steps; NaN where nobody counts."""
    advice: str = ""
    """The line of code that was advised."""


@one_thread()
def train(task: Task, arm: str, seed: int) -> Outcome:
    """Train once and return the outcome."""
    training = task.make(task.steps, seed)
    advice = observed(task, OBSERVED[arm]) if arm in OBSERVED else None
    way = clipping(arm, training.model, training.optimizer, advice)
    run_through(task, training, way)
    line = "" if advice is None else advice.line
    return Outcome(task.name, arm, seed, training.score(), way.clip_rate(), line)


def run_through(task: Task, training: Training, way: Clipping) -> None:
    """Take all steps of a training."""
    groups = training.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    parameters = [*training.model.parameters()]
    for step in range(task.steps):
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * share_of_rate(step, task.steps)
        training.optimizer.zero_grad()
        training.loss(step).backward()
        if training.corrupt_ is not None:
            training.corrupt_(step, [p.grad for p in parameters if p.grad is not None])
        way.before_step()
        training.optimizer.step()
    if way.clipper is not None:
        way.clipper.close()


@functools.cache
def observed(task: Task, max_norm: Literal["auto"] | None) -> Advice:
    """Return the advice after one run that is only measured, or clipped by ``max_norm``."""
    training, sink = task.make(task.steps, OBSERVED_SEED), MemorySink()
    clipper = GradientClipper(training.optimizer, max_norm, log=sink)
    run_through(task, training, Clipping(clipper=clipper))
    return advice_of(task, sink)


def diverged(task: Task, score: float) -> bool:
    """Return whether a training ended worse than one that learned nothing."""
    return not math.isfinite(score) or score > task.chance
