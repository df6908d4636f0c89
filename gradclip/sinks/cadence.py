"""What the sinks of this package share: which steps they take, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from operator import itemgetter

from ..checks import checked_count
from ..errors import ArgumentError
from ..parts import NormsByParameter
from ..records import LoggedStep, Sink

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
        if isinstance(norms, NormsByParameter):
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
