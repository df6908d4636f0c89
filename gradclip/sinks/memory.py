"""Steps in memory, for notebooks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..records import LoggedStep
from .cadence import CadencedSink

if TYPE_CHECKING:
    from pandas import DataFrame


class MemorySink(CadencedSink):
    """Keep the steps in a list.

    They come in batches: `GradientClipper.flush` brings what is still on its way.

    >>> import gradclip, torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    >>> sink = gradclip.MemorySink()
    >>> clipper = gradclip.GradientClipper(optimizer, 1.0, log=sink)
    >>> optimizer.step()
    >>> clipper.flush()
    >>> [step.norm for step in sink.steps]
    [0.0]

    Args:
        every: Keep each step whose index is a multiple of this.
        flush_every: Steps per batch.

    Raises:
        ArgumentError: A number is not positive.
    """

    def __init__(self, every: int = 1, flush_every: int = 100) -> None:
        super().__init__(every, flush_every)
        self.steps: list[LoggedStep] = []
        """The steps so far, in their order."""

    def __repr__(self) -> str:
        return f"MemorySink({len(self.steps)} steps)"

    def write_chosen(self, steps: Sequence[LoggedStep]) -> None:
        """See `CadencedSink.write_chosen`."""
        self.steps += steps

    def to_pandas(self) -> DataFrame:
        """Return the steps as a table: one row each, indexed by ``step``, the fields as columns.

        Raises:
            ImportError: pandas is not installed.
        """
        from pandas import DataFrame

        return DataFrame(self.steps, columns=LoggedStep._fields).set_index("step")
