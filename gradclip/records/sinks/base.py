"""The protocol of a sink, and the options for how often a sink of this package writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from heapq import nlargest
from operator import itemgetter

from ...checks import checked_count
from ...errors import ArgumentError
from ..logged_step import LoggedStep
from ..parameter_norms import ParameterNorms


class Sink(ABC):
    """A destination of logged steps; derive from it to write them anywhere else.

    The clipper calls it with batches, never within the arithmetic of a step. The step that
    completes a batch waits for the sink, so a slow sink should hand its work on. A sink that raises
    is reported once, as a warning, and never stops training: it misses that batch and gets the
    next one. One sink serves one clipper.
    <!-- test: tests/faults/test_sinks.py -->

    Examples:
        >>> import gradclip
        >>> class Largest(gradclip.Sink):
        ...     norm = 0.0
        ...
        ...     def write(self, steps):
        ...         self.norm = max(self.norm, *(step.norm for step in steps))
    """

    flush_every: int = 100
    """Steps per batch: how many a crash may lose. The smallest one of several sinks counts, and a
    batch is complete after ten seconds in any case."""
    per_parameter: int | str = 0
    """Whether rows have `LoggedStep.parameter_norms`: all of them if this is not 0."""
    weights_every: int = 0
    """Rows have `LoggedStep.weight_norms` and `LoggedStep.update_ratios` at each step whose index
    is a multiple of this; 0 for none. See `CadencedSink`."""

    def begin(self, settings: Mapping[str, str]) -> None:  # noqa: B027  # few sinks use it
        """Take the settings of the clipper, by name, before its first step."""

    @abstractmethod
    def write(self, steps: Sequence[LoggedStep]) -> None:
        """Write a batch, in the order of the steps, so that a crash no longer loses it."""

    def flush(self) -> None:  # noqa: B027  # nothing to do if write() leaves nothing behind
        """Write whatever `write` has left in memory."""

    def close(self) -> None:  # noqa: B027  # not every destination needs closing
        """Release the destination. Called once; nothing is written afterwards."""


ALL = "all"


class CadencedSink(Sink):
    """A sink that takes each step whose index is a multiple of a number, or that has weight norms.

    Args:
        every: That number.
        flush_every: Steps per batch: how many a crash may lose.
        per_parameter: How many parameter norms a step has, the largest of the step; "all" for all.
        per_parameter_every: Parameter norms are taken at each step whose index is a multiple of
            this, and at steps with an incident.
        weights_every: The norms of the parameters, and of their changes, are measured and taken at
            each step whose index is a multiple of this; 0 for never. The optimizer's step then
            needs memory for a copy of the parameters.

    Raises:
        ArgumentError: An option is invalid.
    """

    place: str | None = None
    """The file or directory to which other sinks may write as well."""

    def __init__(
        self,
        every: int,
        flush_every: int,
        per_parameter: int | str,
        per_parameter_every: int,
        weights_every: int,
    ) -> None:
        self.every = checked_count("every", every, 1)
        self.flush_every = checked_count("flush_every", flush_every, 1)
        self.per_parameter = _checked_per_parameter(per_parameter)
        self.per_parameter_every = checked_count("per_parameter_every", per_parameter_every, 1)
        self.weights_every = checked_count("weights_every", weights_every, 0)

    def follow(self, count_steps: Callable[[], int]) -> None:
        """Take what counts the steps of the clipper, which is attached now."""

    def chosen(self, steps: Sequence[LoggedStep], *, incidents: bool = False) -> list[LoggedStep]:
        """Return the steps of a batch that are taken, with the parameter norms that are asked for.

        Args:
            steps: A batch.
            incidents: Whether steps with an incident are taken at any index.
        """
        return [
            step._replace(parameter_norms=self._largest_norms(step))
            for step in steps
            if step.step % self.every == 0
            or step.weight_norms is not None
            or (incidents and step.incident)
        ]

    def _largest_norms(self, step: LoggedStep) -> dict[str, float] | None:
        norms, count = step.parameter_norms, self.per_parameter
        is_due = step.incident or step.step % self.per_parameter_every == 0
        if not (count and norms and is_due):
            return None
        if isinstance(count, str):
            return {**norms}
        if isinstance(norms, ParameterNorms):
            return norms.largest(count)
        return dict(nlargest(count, norms.items(), key=itemgetter(1)))


def _checked_per_parameter(per_parameter: object) -> int | str:
    if per_parameter == ALL:
        return ALL
    if isinstance(per_parameter, str):
        raise ArgumentError(
            f'per_parameter is {per_parameter!r}: give how many parameters, or "all".'
        )
    return checked_count("per_parameter", per_parameter, 0)
