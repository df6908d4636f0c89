"""Runs of TensorBoard's data provider, for files that are not on this machine: a sample."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

from ..report.tags import TaggedRuns, parsed_tag
from .run_view import RunView

SCALARS = "scalars"
"""The plugin of TensorBoard that owns the curves."""
POINTS = 10_000
"""Points of a curve that are asked for; TensorBoard may keep fewer."""
SECONDS = 4.0
"""So long an answer of the provider serves."""


class ProvidedRuns:
    """The runs of a data provider; see `ServedRuns`.

    Args:
        provider: The ``DataProvider`` of TensorBoard; None if it has none.
    """

    is_reading = False

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._due = 0.0
        self._notes: list[str] = []
        self.views: dict[str, RunView] = {}

    def refreshed(self, environment: dict[str, Any]) -> tuple[dict[str, RunView], list[str]]:
        """See `ServedRuns`."""
        if self._provider is None:
            return {}, ["This TensorBoard has neither local event files nor a data provider."]
        if time.monotonic() >= self._due:
            self.views = self._read(environment)
            self._due = time.monotonic() + SECONDS
        if not self.views:
            return {}, ["TensorBoard knows of no run with gradient norms."]
        return self.views, []

    def _read(self, environment: dict[str, Any]) -> dict[str, RunView]:
        from tensorboard.backend.experiment_id import WSGI_ENVIRON_KEY
        from tensorboard.context import from_environ
        from tensorboard.data.provider import RunTagFilter

        asked = {
            "experiment_id": environment.get(WSGI_ENVIRON_KEY, ""),
            "plugin_name": SCALARS,
        }
        context = from_environ(environment)
        listed = self._provider.list_scalars(context, **asked)
        runs = [run for run, tags in listed.items() if any(map(parsed_tag, tags))]
        curves = self._provider.read_scalars(
            context, **asked, downsample=POINTS, run_tag_filter=RunTagFilter(runs=runs)
        )
        return {
            view.run.name: view
            for run, tags in sorted(curves.items())
            for view in _views(run, tags)
        }


def _views(name: str, curves: dict[str, Any]) -> list[RunView]:
    """Return the runs that the curves of one run of TensorBoard hold."""
    by_step: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for tag, points in curves.items():
        for point in points:
            by_step[point.step][tag] = point.value
    runs = TaggedRuns(name)
    for step, numbers in sorted(by_step.items()):
        runs.add(step, numbers)
    return [RunView(run, sampled=True) for run in runs.runs()]


def has_norms(provider: Any) -> bool:
    """Return whether a data provider knows of a run with norms."""
    from tensorboard.context import RequestContext

    listed = provider.list_scalars(RequestContext(), experiment_id="", plugin_name=SCALARS)
    return any(parsed_tag(tag) for tags in listed.values() for tag in tags)
