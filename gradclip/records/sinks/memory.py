"""A sink that keeps the steps in memory, for notebooks and tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentError
from ..logged_step import LoggedStep
from .base import CadencedSink
from .tags import PARAMETER_TAGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


class MemorySink(CadencedSink):
    """Keep the steps in a list.

    Steps arrive in batches: `GradientClipper.flush` brings those that are still on their way.
    <!-- test: tests/logging/test_memory.py -->

    Examples:
        >>> import gradclip, torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> sink = gradclip.MemorySink()
        >>> clipper = gradclip.GradientClipper(optimizer, 1.0, log=sink)
        >>> optimizer.step()
        >>> clipper.flush()
        >>> [step.norm for step in sink.steps]
        [0.0]

    Args:
        every: Keep each step whose index is a multiple of this, and steps with an incident.
        flush_every: Steps per batch.
        per_parameter: How many parameter norms are kept with a step: the largest ones, before
            clipping; "all" for all of them.
        per_parameter_every: Parameter norms are kept at each step whose index is a multiple of
            this, and at steps with an incident.
        weights_every: Weight norms and update ratios (norm of a parameter's change, divided by its
            norm before the step) are kept at each step whose index is a multiple of this; 0 for
            never. They need memory for a copy of the parameters.

    Raises:
        ArgumentError: A number is not positive.

    <!-- test: tests/contracts/sinks/test_contract.py -->
    """

    def __init__(
        self,
        every: int = 1,
        flush_every: int = 100,
        per_parameter: int | str = 0,
        per_parameter_every: int = 1,
        weights_every: int = 0,
    ) -> None:
        super().__init__(every, flush_every, per_parameter, per_parameter_every, weights_every)
        self.steps: list[LoggedStep] = []
        """The steps so far, in the order in which they were taken."""

    def __repr__(self) -> str:
        return f"MemorySink({len(self.steps)} steps)"

    def write(self, steps: Sequence[LoggedStep]) -> None:
        """See `Sink.write`."""
        self.steps += self.chosen(steps, incidents=True)

    def to_pandas(self) -> DataFrame:
        """Return the steps as a table: a row for each step, indexed by ``step``, a column a field.

        What is known of each parameter has columns of its own, ``parameter_norm/<name>``,
        ``weight_norm/<name>`` and ``update_ratio/<name>``, NaN at steps without it.
        <!-- test: tests/logging/test_memory.py -k table -->

        Raises:
            ImportError: pandas is not installed.
        """
        from pandas import DataFrame, concat

        table = DataFrame(self.steps, columns=LoggedStep._fields).set_index("step")
        tables = [table.drop(columns=[*PARAMETER_TAGS])]
        for field, tag in PARAMETER_TAGS.items():
            rows = [getattr(step, field) or {} for step in self.steps]
            tables.append(DataFrame(rows, index=table.index).add_prefix(f"{tag}/"))
        return concat(tables, axis=1)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Return a picture of the steps, as ``gradclip report --plot`` draws it; notebooks show it.

        The figure has a canvas of its own and pyplot does not know it: no window opens, and nothing
        has to be closed.
        <!-- test: tests/logging/test_memory.py -k picture;
        tests/behaviour/command_line/test_demo.py -k global_state -->

        Args:
            path: A file to write the picture to, too; it ends with .png or .svg.

        Raises:
            ArgumentError: There are no steps yet, or the path does not fit a picture.
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
