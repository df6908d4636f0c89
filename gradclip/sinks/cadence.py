"""What the sinks of this package share: which steps they take, and how many at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from ..checks import checked_count
from ..records import LoggedStep, Sink


class CadencedSink(Sink):
    """A sink that takes each step whose index is a multiple of a number.

    Args:
        every: That number.
        flush_every: Steps per batch: how many a crash may lose.

    Raises:
        ArgumentError: One of them is no whole number >= 1.
    """

    def __init__(self, every: int, flush_every: int) -> None:
        self.every = checked_count("every", every, 1)
        self.flush_every = checked_count("flush_every", flush_every, 1)

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        chosen = [step for step in steps if step.step % self.every == 0]
        if chosen:
            self.write_chosen(chosen)

    @abstractmethod
    def write_chosen(self, steps: Sequence[LoggedStep]) -> None:
        """Write the steps that are taken, at least one."""
