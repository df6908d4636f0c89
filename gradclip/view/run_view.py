"""The answers about one run that the page asks for, as JSON objects.

The page asks its ``source`` (``page/source.js``); in a file the answers are embedded, in
TensorBoard the plugin gives them. Both are made here:

=================  ================================================================================
``overview()``     name, steps, clip rate, advice, incidents, distribution, what else there is
``series()``       norms, threshold, loss, clip rate and marks, in buckets of steps
``scalar()``       another scalar that was logged in the run's directory
``parameters()``   gradient norms, weight norms or update ratios of single parameters
=================  ================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..report.advice import advised
from ..report.clip_rate import running_clip_rate, window_of
from ..report.incidents import incidents_of
from ..report.printing import json_value
from ..report.run import LoggedParameterNorms, Run
from ..report.shares import mean_shares
from ..report.summary import summarized
from .arrays import Json
from .distribution import distribution_of
from .parameters import ParameterTable, mean_values
from .series import Buckets, curves

FORMAT = 1
"""Version of the answers. A page that meets another one says so and shows nothing."""


class RunView:
    """What the page shows of a run. Answers that cost time are kept.

    Args:
        run: The run.
        sampled: True if the run has only a sample of the steps that were logged.
    """

    def __init__(self, run: Run, *, sampled: bool = False) -> None:
        self.run = run
        self._sampled = sampled

    @property
    def listed(self) -> Json:
        """The run as the list of runs has it; it changes when the run grows."""
        return {
            "name": self.run.name,
            "steps": len(self.run),
            "first": int(self.run.steps[0]),
            "last": int(self.run.steps[-1]),
            "sampled": self._sampled,
            "observed": self.run.observed,
        }

    @cached_property
    def overview(self) -> Json:
        """All that does not depend on the range of steps that the page shows."""
        run = self.run
        summary = summarized(run)
        incidents, more = incidents_of(run)
        return {
            "format": FORMAT,
            **self.listed,
            "clip_rate_window": window_of(run),
            "summary": _json_of(asdict(summary)),
            "advice": _json_of(asdict(advised(run, summary))),
            "incidents": [_json_of(asdict(incident)) for incident in incidents],
            "more_incidents": more,
            "distribution": distribution_of(run),
            "scalars": [*run.scalars],
            "quantities": [*self._tables],
        }

    def series(self, first: float, last: float, buckets: int) -> Json:
        """Return the curves and marks of a range of steps.

        The columns are "norm", "clipped_norm", "threshold", "loss" and "clip_rate"; the counts
        are "nonfinite", "skipped", "clipped" and "loss_nonfinite". Those that are empty in this
        range are absent.

        Args:
            first: First step of the range.
            last: Last step of the range, included.
            buckets: Most buckets; two or three more may come.

        Raises:
            ArgumentError: There is to be no bucket.
        """
        _check(buckets)
        return curves(Buckets(self.run.steps, first, last, buckets), self._columns, self._flags)

    def scalar(self, tag: str, first: float, last: float, buckets: int) -> Json:
        """Return another scalar that was logged beside the run, as the column "value".

        Args:
            tag: One of ``overview["scalars"]``.
            first: First step of the range.
            last: Last step of the range, included.
            buckets: Most buckets; two or three more may come.

        Raises:
            ArgumentError: The run has no such scalar, or there is to be no bucket.
        """
        _check(buckets)
        if tag not in self.run.scalars:
            raise ArgumentError(
                f"{self.run.name} has no scalar {tag!r}: ask for one of {[*self.run.scalars]}."
            )
        logged = self.run.scalars[tag]
        found = Buckets(logged.steps, first, last, buckets)
        return curves(found, {"value": logged.values}, {})

    def parameters(
        self,
        quantity: str,
        first: float,
        last: float,
        buckets: int,
        search: str = "",
        most: int = 1000,
    ) -> Json:
        """Return the largest values of single parameters in buckets of a range of steps.

        Args:
            quantity: One of ``overview["quantities"]``.
            first: First step of the range.
            last: Last step of the range, included.
            buckets: Most buckets.
            search: Only parameters whose name contains this, in either case.
            most: Most parameters.

        Raises:
            ArgumentError: The run has no such quantity, or there is to be no bucket.
        """
        _check(buckets)
        if quantity not in self._tables:
            raise ArgumentError(
                f"{self.run.name} has no {quantity!r} of parameters: ask for one of "
                f"{[*self._tables]}, or log it with per_parameter= or weights_every=."
            )
        return self._tables[quantity].answer(first, last, buckets, search, most)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        run = self.run
        columns = {
            "norm": run.norms,
            "clipped_norm": run.clipped_norms,
            "threshold": run.thresholds,
            "clip_rate": running_clip_rate(run, window_of(run)),
        }
        if np.isnan(run.clip_rate):
            del columns["clip_rate"]
        if run.losses is not None:
            columns["loss"] = run.losses
        return columns

    @cached_property
    def _flags(self) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
        run = self.run
        flags = {"nonfinite": ~run.finite, "skipped": run.skipped, "clipped": run.clipped}
        if run.losses is not None:
            flags["loss_nonfinite"] = np.isinf(run.losses)
        return flags

    @cached_property
    def _tables(self) -> Mapping[str, ParameterTable]:
        run = self.run
        tables = {}
        if run.parameter_norms is not None:
            shares = mean_shares(run, run.parameter_norms)
            tables["parameter_norms"] = ParameterTable(run.parameter_norms, shares)
        for name in ("weight_norms", "update_ratios"):
            logged: LoggedParameterNorms | None = getattr(run, name)
            if logged is not None:
                tables[name] = ParameterTable(logged, mean_values(logged))
        return tables


def _check(buckets: int) -> None:
    if buckets < 1:
        raise ArgumentError(f"buckets is {buckets}: ask for 1 or more.")


def _json_of(fields: Mapping[str, object]) -> Any:
    return json_value(fields)
