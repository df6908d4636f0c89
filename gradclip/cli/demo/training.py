"""One run: the training loop of the demo, clipped or only observed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.tensorboard import SummaryWriter

from ...clipper import GradientClipper
from ...records.logged_step import LoggedStep
from ...records.sinks.base import Sink
from ...records.sinks.tensorboard import TensorBoardSink
from .curves import Curves
from .options import LOG_SUFFIX, Options
from .task import Text, batches, seeded_model

LEARNING_RATE = 1.0


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread.

    Sums depend on the number of threads, and in an unstable run their last digit decides
    everything after it. At this size a second thread is no faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(options: Options, text: Text, curves: Curves, advance: Callable[[float], None]) -> None:
    """Train a model, and fill in its curves step by step.

    Both runs get the same weights and batches: what differs between them is the clipping.

    Args:
        options: What the user has chosen.
        text: What is learnt.
        curves: Those of the run, still empty.
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
    """Adds the norms to the curves of a run."""

    def __init__(self, curves: Curves) -> None:
        self._curves = curves

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        self._curves.norms += [step.norm for step in steps]
        self._curves.clip_rate = steps[-1].clip_rate
