"""Steps in memory, for notebooks and tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentError
from ..logged_step import LoggedStep
from .base import CadencedSink
from .tags import OF_PARAMETER

if TYPE_CHECKING:
    from matplotlib.figure import Figure
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
        every: Keep each step whose index is a multiple of this, and those that there is something
            to say of: `LoggedStep.incident`.
        flush_every: Steps per batch.
        per_parameter: Of how many parameters the norms are kept, before clipping: the largest of
            the moment; "all" for all.
        per_parameter_every: Of the steps that are kept, those whose norms by parameter are: each
            whose index is a multiple of this, and those that there is something to say of.

    Raises:
        ArgumentError: A number is not positive.
    """

    def __init__(
        self,
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
    ) -> None:
        super().__init__(every, flush_every, per_parameter, per_parameter_every)
        self.steps: list[LoggedStep] = []
        """The steps so far, in their order."""

    def __repr__(self) -> str:
        return f"MemorySink({len(self.steps)} steps)"

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        self.steps += self.chosen(steps, incidents=True)

    def to_pandas(self) -> DataFrame:
        """Return the steps as a table: one row each, indexed by ``step``, the fields as columns.

        The norms of parameters have columns of their own, ``parameter_norm/<name>``, NaN where
        they were not asked for.

        Raises:
            ImportError: pandas is not installed.
        """
        from pandas import DataFrame

        table = DataFrame(self.steps, columns=LoggedStep._fields).set_index("step")
        norms = [step.parameter_norms or {} for step in self.steps]
        by_name = DataFrame(norms, index=table.index).add_prefix(f"{OF_PARAMETER}/")
        return table.drop(columns="parameter_norms").join(by_name)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Return a picture of the steps, as ``gradclip report --plot`` draws it; notebooks show it.

        It is a figure with a canvas of its own, which pyplot knows nothing of.

        Args:
            path: A file to write it to as well, which ends with .png or .svg.

        Raises:
            ArgumentError: There are no steps yet, or there can be no picture at this path.
            ImportError: matplotlib is not installed.
        """
        from ...report.pictures.picture import draw, figure_of
        from ...report.run import run_of

        if not self.steps:
            raise ArgumentError(
                "There are no steps to draw yet: give this sink to a clipper as log=, take steps, "
                "and call the clipper's flush()."
            )
        runs = [run_of(self.steps, f"{len(self.steps):,} steps in memory")]
        return figure_of(runs) if path is None else draw(runs, path)
