"""One training run of the demo, clipped or only measured, with its loss and norm curves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.tensorboard import SummaryWriter

from ...clipper import GradientClipper
from ...records.logged_step import LoggedStep
from ...records.sinks.base import Sink
from ...records.sinks.tensorboard import TensorBoardSink
from .options import LOG_SUFFIX, Options
from .task import Text, batches, seeded_model

LEARNING_RATE = 1.0
FINAL_STEPS = 10
"""Number of last steps whose mean loss is the final loss."""


@dataclass(slots=True)
class Curves:
    """Loss and norm at every step of a training, and the counts of its clipper."""

    run: str
    """Name of the run and of its folder."""
    clips: bool
    """Whether gradients are clipped; if not, they are only observed."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Norms before clipping."""
    clip_rate: float = 0.0
    """Share of the finite norms that were above the threshold."""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """Title of the run in tables and pictures."""
        return "with clipping" if self.clips else "without clipping"

    @property
    def final_loss(self) -> float:
        """Mean of the last losses; NaN if one of them is NaN."""
        last = self.losses[-FINAL_STEPS:]
        return sum(last) / len(last)

    @property
    def largest_norm(self) -> float:
        """Largest finite norm; NaN if there is none."""
        return max((norm for norm in self.norms if math.isfinite(norm)), default=math.nan)

    @property
    def nonfinite_norms(self) -> int:
        """Number of norms that are NaN or infinite."""
        return sum(not math.isfinite(norm) for norm in self.norms)

    @property
    def steps_per_second(self) -> float:
        """Steps per second of training, logging included."""
        return len(self.losses) / self.seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    The order of a sum depends on the number of threads. In an unstable training, the last digit of
    a sum decides everything after it. At this size, a second thread is no faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(options: Options, text: Text, curves: Curves, advance: Callable[[float], None]) -> None:
    """Train a model and fill in its curves step by step.

    Both trainings of the demo start with the same weights and see the same batches. They differ
    only in clipping.

    Args:
        options: The options of the command.
        text: The text to learn.
        curves: Curves of the run, still empty.
        advance: Called after every step with its loss.
    """
    model = seeded_model(options.cell, len(text.alphabet), options.seed)
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    writer = SummaryWriter(options.logs(curves.run), filename_suffix=LOG_SUFFIX)
    logged = TensorBoardSink(writer, per_parameter="all")
    exceed = "scale" if curves.clips else "observe"
    clipper = GradientClipper(
        optimizer, options.max_norm, exceed=exceed, model=model, log=[logged, _Norms(curves)]
    )
    start = time.perf_counter()
    with writer, clipper:
        for step, (inputs, targets) in enumerate(batches(text, options.steps, options.seed)):
            scores = model(inputs)
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()  # the clipper acts here
            writer.add_scalar("loss", loss.item(), step)
            curves.losses.append(loss.item())
            advance(loss.item())
    curves.seconds = time.perf_counter() - start


class _Norms(Sink):
    """Adds the norms of a training to its curves."""

    def __init__(self, curves: Curves) -> None:
        self._curves = curves

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        self._curves.norms += [step.norm for step in steps]
        self._curves.clip_rate = steps[-1].clip_rate
