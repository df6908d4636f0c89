"""Training of two arms of networks, clipped and unclipped, on the same sequences."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.experiments.temporal_order.task import (
    Networks,
    generators_for,
    sequences,
    sequences_of_all,
)
from gradclip import GradientClipper

LEARNING_RATE, BATCH, MAX_NORM = 0.01, 20, 1.0
VALIDATION, TEST, LARGEST_ERROR = 500, 10_000, 0.01
ARMS = ("clipped", "unclipped")


@dataclass(frozen=True)
class Plan:
    """The settings of a training; a checkpoint with another plan is refused."""

    length: int
    """Length of the sequences."""
    seeds: int
    """Number of networks in each arm."""
    check_every: int = 250
    """Updates between two checks and checkpoints."""


class Arm:
    """The networks of all seeds, trained by one optimizer.

    Gradients are clipped seed by seed: index i of dimension 0 of all parameters has one norm. A
    norm that is not finite sets the gradients of its own seed to 0 in that step. The unclipped arm
    only observes: its gradients are not written, and its records show what clipping would do.

    Args:
        plan: The settings.
        name: Name in `ARMS`.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.networks = Networks(plan.seeds, plan.length)
        self.optimizer = torch.optim.SGD(self.networks.parameters(), lr=LEARNING_RATE)
        self.clipper = GradientClipper(
            self.optimizer,
            MAX_NORM,
            scope=lambda name, parameter: range(len(parameter)),
            exceed="scale" if name == "clipped" else "observe",
            nonfinite="zero",
            model=self.networks,
        )
        self.largest_norms = torch.zeros(plan.seeds, dtype=torch.float64)
        self.solved_at: list[int | None] = [None] * plan.seeds
        self.diverged_at: list[int | None] = [None] * plan.seeds
        self.validation_errors: list[list[float]] = []
        self._generators = generators_for("checks", plan.length, plan.seeds)

    def train(self, symbols: Tensor, classes: Tensor) -> None:
        """Take one step with a batch for each seed."""
        self.optimizer.zero_grad()
        self.networks.loss(symbols, classes).backward()
        self.optimizer.step()
        record = self.clipper.last
        if record is not None:
            self.largest_norms = torch.maximum(self.largest_norms, record.norms)

    def check(self, updates: int) -> None:
        """Record which seeds have diverged and which have solved the task by now.

        A seed with at most 1 % errors on few sequences is a candidate: it is tested on 10,000
        fresh sequences, as the definition requires.
        """
        drawn = sequences_of_all(self.plan.length, VALIDATION, self._generators)
        wrong = self.networks.errors(*drawn).tolist()
        self.validation_errors.append([count / VALIDATION for count in wrong])
        for seed, finite in enumerate(self.networks.finite().tolist()):
            if not finite and self.diverged_at[seed] is None:
                self.diverged_at[seed] = updates
            is_candidate = (
                self.solved_at[seed] is None and wrong[seed] <= LARGEST_ERROR * VALIDATION
            )
            if is_candidate and self.error_of(seed, self._generators[seed]) < LARGEST_ERROR:
                self.solved_at[seed] = updates

    def error_of(self, seed: int, generator: torch.Generator) -> float:
        """Return the error of a seed's network on 10,000 fresh sequences."""
        symbols, classes = sequences(self.plan.length, TEST, generator)
        wrong = self.networks.errors(symbols.unsqueeze(1), classes.unsqueeze(0), seed)
        return wrong.item() / TEST

    def final_errors(self) -> list[float]:
        """Return the errors of all seeds, always on the same sequences."""
        generators = generators_for("final test", self.plan.length, self.plan.seeds)
        return [self.error_of(seed, generator) for seed, generator in enumerate(generators)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which training continues."""
        return {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "clipper": self.clipper.state_dict(),
            "largest_norms": self.largest_norms,
            "solved_at": self.solved_at,
            "diverged_at": self.diverged_at,
            "validation_errors": self.validation_errors,
            "generators": _states_of(self._generators),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""
        for name in ("networks", "optimizer", "clipper"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("largest_norms", "solved_at", "diverged_at", "validation_errors"):
            setattr(self, name, state[name])
        _set_states(self._generators, state["generators"])


class Pair:
    """Both arms together: the same initial weights, and the same sequences in every update.

    Args:
        plan: The settings.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.arms = {name: Arm(plan, name) for name in ARMS}
        self.updates = 0
        self.seconds = 0.0
        self._generators = generators_for("training", plan.length, plan.seeds)

    def round(self) -> None:
        """Train both arms until the next check, and check them."""
        begin, count = time.monotonic(), self.plan.check_every
        drawn = sequences_of_all(self.plan.length, count * BATCH, self._generators)
        symbols, classes = (each.unflatten(-1, (count, BATCH)) for each in drawn)
        self.updates += count
        for arm in self.arms.values():
            for update in range(count):
                arm.train(symbols[..., update, :], classes[..., update, :])
            arm.check(self.updates)
        self.seconds += time.monotonic() - begin

    def save(self, path: Path) -> None:
        """Write a checkpoint. The earlier one is replaced when this one is complete."""
        state = {
            "plan": vars(self.plan),
            "updates": self.updates,
            "seconds": self.seconds,
            "generators": _states_of(self._generators),
            "arms": {name: arm.state_dict() for name, arm in self.arms.items()},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Restore a checkpoint.

        Raises:
            ValueError: The checkpoint has another plan.
        """
        state = torch.load(path, weights_only=True)
        if state["plan"] != vars(self.plan):
            raise ValueError(
                f"{path} is a checkpoint of {state['plan']}, not of {vars(self.plan)}: give the "
                "same options, or another folder."
            )
        self.updates, self.seconds = state["updates"], state["seconds"]
        _set_states(self._generators, state["generators"])
        for name, arm in self.arms.items():
            arm.load_state_dict(state["arms"][name])


def trained(plan: Plan, updates: int, minutes: float, checkpoint: Path | None) -> Pair:
    """Train until one of the budgets is spent, starting from a checkpoint if there is one.

    Args:
        plan: The settings.
        updates: Largest number of updates of each arm.
        minutes: Wall time after which no round begins; resumed runs are counted together.
        checkpoint: Path of the checkpoint; None keeps none.
    """
    pair = Pair(plan)
    if checkpoint is not None and checkpoint.exists():
        pair.load(checkpoint)
    while pair.updates < updates and pair.seconds < 60 * minutes:
        pair.round()
        if checkpoint is not None:
            pair.save(checkpoint)
        counts = {name: _solved(arm) for name, arm in pair.arms.items()}
        progress = f"L = {plan.length}, {pair.updates:,} updates, {pair.seconds:.0f} s: {counts}"
        print(progress, file=sys.stderr, flush=True)
    return pair


def _solved(arm: Arm) -> str:
    solved = sum(at is not None for at in arm.solved_at)
    mean = sum(arm.validation_errors[-1]) / arm.plan.seeds
    return f"{solved} solved, error {mean:.3f}, clip rate {arm.clipper.clip_rate():.4f}"


def _states_of(generators: list[torch.Generator]) -> list[Tensor]:
    return [generator.get_state() for generator in generators]


def _set_states(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
