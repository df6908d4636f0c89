"""The protocol of a sink, and the cadence that the sinks of this package share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from heapq import nlargest
from operator import itemgetter

from ...checks import checked_count
from ...errors import ArgumentError
from ..logged_step import LoggedStep
from ..parameter_norms import ParameterNorms


class Sink(ABC):
    """Where logged steps go; the one thing to derive from for a destination of one's own.

    Called by the clipper with batches, never within the arithmetic of a step. The step that
    completes a batch waits for it, so that one that is slow should hand its work on. A sink that
    raises is reported once as a warning and never stops training: it misses that batch and is given
    the next. One sink serves one clipper.

    >>> import gradclip
    >>> class Largest(gradclip.Sink):
    ...     norm = 0.0
    ...
    ...     def write(self, steps):
    ...         self.norm = max(self.norm, *(step.norm for step in steps))
    """

    flush_every: int = 100
    """Steps per batch: how many a crash may lose. Of several sinks, the smallest counts."""
    per_parameter: int | str = 0
    """Whether it wants `LoggedStep.parameter_norms`; where not 0, those of all parameters come."""

    def begin(self, settings: Mapping[str, str]) -> None:  # noqa: B027  # few want to know
        """Hear how the clipper is set, by name, before its first step."""

    @abstractmethod
    def write(self, steps: Sequence[LoggedStep]) -> None:
        """Take over a batch in the order of the steps, and leave it safe from a crash."""

    def flush(self) -> None:  # noqa: B027  # nothing to do where write() leaves nothing behind
        """Make durable what `write` has left in memory."""

    def close(self) -> None:  # noqa: B027  # not every destination needs closing
        """Release the destination. Called once; nothing is written afterwards."""


ALL = "all"


class CadencedSink(Sink):
    """A sink that takes each step whose index is a multiple of a number.

    Args:
        every: That number.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: How many parameters' norms are wanted, the largest of the moment; "all" for
            those of all.
        per_parameter_every: At which of the steps that are taken: each whose index is a multiple of
            this, and those that there is something to say of.

    Raises:
        ArgumentError: One of them is no such number.
    """

    def __init__(
        self, every: int, flush_every: int, per_parameter: int | str, per_parameter_every: int
    ) -> None:
        self.every = checked_count("every", every, 1)
        self.flush_every = checked_count("flush_every", flush_every, 1)
        self.per_parameter = _checked_number(per_parameter)
        self.per_parameter_every = checked_count("per_parameter_every", per_parameter_every, 1)

    def chosen(self, steps: Sequence[LoggedStep], *, incidents: bool = False) -> list[LoggedStep]:
        """Return the steps that are taken, with those norms of parameters that are wanted.

        Args:
            steps: A batch.
            incidents: Whether also those that there is something to say of, at any index.
        """
        return [
            step._replace(parameter_norms=self._wanted_norms(step))
            for step in steps
            if step.step % self.every == 0 or (incidents and step.incident)
        ]

    def _wanted_norms(self, step: LoggedStep) -> dict[str, float] | None:
        norms, count = step.parameter_norms, self.per_parameter
        on_time = step.incident or step.step % self.per_parameter_every == 0
        if not (count and norms and on_time):
            return None
        if isinstance(count, str):
            return {**norms}
        if isinstance(norms, ParameterNorms):
            return norms.largest(count)
        return dict(nlargest(count, norms.items(), key=itemgetter(1)))


def _checked_number(per_parameter: object) -> int | str:
    if per_parameter == ALL:
        return ALL
    if isinstance(per_parameter, str):
        raise ArgumentError(
            f'per_parameter is {per_parameter!r}: give how many parameters, or "all".'
        )
    return checked_count("per_parameter", per_parameter, 0)
