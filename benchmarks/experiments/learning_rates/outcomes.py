"""Trainings, one for each network, learning rate, arm and seed, and the file of their outcomes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.experiments.learning_rates.networks import NETWORKS
from benchmarks.experiments.without_tuning.training import train


@dataclass(frozen=True, order=True)
class Job:
    """One training."""

    seed: int
    network: str
    """A key of `NETWORKS`."""
    rate: float
    """The learning rate."""
    arm: str
    """A way to clip, as in the experiment without tuning."""


@dataclass(frozen=True)
class Outcome(Job):
    """The end of one training."""

    loss: float
    """On held-out text, in nats; NaN or infinite where the weights are."""
    clip_rate: float
    """Share of clipped steps; NaN without a clipper."""

    @property
    def job(self) -> Job:
        """The training that ended so."""
        return Job(self.seed, self.network, self.rate, self.arm)


def trained(job: Job) -> Outcome:
    """Train once."""
    ended = train(NETWORKS[job.network].task(job.rate), job.arm, job.seed)
    return Outcome(**asdict(job), loss=ended.score, clip_rate=ended.clip_rate)


def read(path: Path) -> list[Outcome]:
    """Return the outcomes of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text().splitlines()]


def completed(jobs: Sequence[Job], path: Path) -> list[Outcome]:
    """Return the outcomes of all jobs; those that the file lacks are computed and appended."""
    outcomes = {outcome.job: outcome for outcome in read(path)}
    missing = [job for job in jobs if job not in outcomes]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for count, job in enumerate(missing, start=1):
            outcomes[job] = trained(job)
            file.write(json.dumps(asdict(outcomes[job])) + "\n")
            file.flush()
            print(f"\r{count} of {len(missing)}", end="", file=sys.stderr, flush=True)
    return [outcomes[job] for job in jobs]
