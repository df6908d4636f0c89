"""Runs put together from numbers under tags, as TensorBoard and the loggers of trainers keep them.

A clipper's curves are ``grad_norm/pre``, ``grad_norm/post`` and so on. A trainer may put a prefix
before them (``train/grad_norm/pre``, or ``train-grad_norm/pre`` by a ``prefix=`` of Lightning's
loggers) and write each number by itself. Trainers that clip by themselves log the norm before
clipping alone: ``train/grad_norm`` of Transformers, and what Lightning's ``grad_norm`` returns,
``grad_2.0_norm_total`` with ``grad_2.0_norm/<name>`` for each parameter.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from ..records.sinks.tags import INDEX, PARAMETER_TAGS, QUANTITIES
from .run import LoggedScalar, Run, RunBuilder, as_logged_loss, not_replaced

SAID = "/incidents"
"""End of the tag of a clipper's sentences about steps that stand out."""
SETTINGS = "/settings"
"""End of the tag of a clipper's options."""
OBSERVES = "| exceed | observe |"
"""The option of a clipper that only observes."""
PLAIN = "plain"
"""The name of a norm that a trainer has logged, before it was clipped."""
_TAG = re.compile(
    r"(?P<prefix>(?:.+[/-])?)(?:"
    r"grad_norm(?P<clipper>_\d+)?/(?P<quantity>pre|post|threshold|skipped_steps|loss)"
    rf"|(?P<kind>{'|'.join(PARAMETER_TAGS.values())})(?P<its_clipper>_\d+)?/(?P<parameter>.+)"
    r"|grad_(?:[\d.]+|inf)_norm/(?P<its_gradient>.+)"
    r"|(?P<plain>grad_norm|grad_(?:[\d.]+|inf)_norm_total))",
    re.DOTALL,
)


_OWN = re.compile(r"(?:.+[/-])?grad_norm(?:_\d+)?/(?P<quantity>[^/]+)", re.DOTALL)
_FIELDS = {tag: field for field, tag in PARAMETER_TAGS.items()}


class Tag(NamedTuple):
    """What a tag says."""

    run: str
    """The clipper or trainer: ``grad_norm``, ``grad_norm_2``, ``train/grad_norm``."""
    name: str
    """The quantity, or the name of a parameter."""
    field: str | None = None
    """For a parameter, the field of a `LoggedStep` that holds such numbers."""


@lru_cache(maxsize=1 << 16)  # the same tags return at every step
def parsed_tag(tag: str) -> Tag | None:
    """Return what a tag says; None for a foreign tag."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    suffix = match["clipper"] or match["its_clipper"] or ""
    run = f"{match['prefix']}grad_norm{suffix}"
    if match["parameter"] is not None:
        return Tag(run, match["parameter"], _FIELDS[match["kind"]])
    if match["its_gradient"] is not None:
        return Tag(run, match["its_gradient"], "parameter_norms")
    return Tag(run, match["quantity"] or PLAIN)


def _ignored(step: int, number: float) -> None:
    """Add nothing: the number can be computed from others of its step."""


class TaggedRuns:
    """Collects numbers by step, in the order in which they were logged.

    Args:
        name: Name of the file or directory, which names the runs.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._runs: dict[str, _TaggedRun] = {}
        self._scalars: dict[str, _Scalar] = {}
        self._observing: set[str] = set()
        """The runs whose clipper only observes."""
        self._newer: dict[str, None] = {}
        self._adders: dict[str, Callable[[int, float], object]] = {}

    def configure(self, tag: str, settings: str) -> None:
        """Take the options of the clipper that writes a run from now on, as a table."""
        run = tag.removesuffix(SETTINGS)
        self._observing.discard(run)
        if OBSERVES in settings:
            self._observing.add(run)

    def say(self, step: int, sentences: Mapping[str, str]) -> None:
        """Add what clippers said of the step that was added last, by tag."""
        for tag, sentence in sentences.items():
            run = self._runs.get(tag.removesuffix(SAID))
            if run is not None:
                run.say(step, sentence)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add numbers of a step by tag; those of foreign tags become scalars of all the runs."""
        for tag, number in numbers.items():
            if tag not in self._adders:  # a tag is looked at once, not at every step
                self._adders[tag] = self._adder_of(tag)
            self._adders[tag](step, number)

    def _adder_of(self, text: str) -> Callable[[int, float], object]:
        """Return what adds the numbers of a tag."""
        tag = parsed_tag(text)
        if tag is not None:
            run = self._runs.get(tag.run)
            if run is None:
                shown = self._name if tag.run == "grad_norm" else f"{self._name} ({tag.run})"
                run = self._runs[tag.run] = _TaggedRun(shown)
            return partial(run.add, tag)
        own = _OWN.fullmatch(text)
        if own is None:
            return self._scalars.setdefault(text, _Scalar()).add
        if own["quantity"] not in QUANTITIES and own["quantity"] != INDEX:
            self._newer[text] = None
        return _ignored

    @property
    def trouble(self) -> str | None:
        """The reason why not all numbers of a clipper are read; None if there is none."""
        if not self._newer:
            return None
        return f"it has numbers of a newer gradclip: {', '.join(self._newer)}"

    def runs(self) -> list[Run]:
        """Return the runs that have norms so far, sorted by their tags."""
        builders = {tag: run.so_far() for tag, run in sorted(self._runs.items())}
        scalars = {tag: scalar.logged() for tag, scalar in sorted(self._scalars.items())}
        return [
            replace(builder.run(), scalars=scalars, observed=tag in self._observing)
            for tag, builder in builders.items()
            if builder
        ]


class _Scalar:
    """The values of a foreign tag, in typed arrays for the same reason as in `run.py`."""

    def __init__(self) -> None:
        self._steps, self._values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        self._steps.append(step)
        self._values.append(value)

    def logged(self) -> LoggedScalar:
        steps, values = np.array(self._steps), np.array(self._values)
        kept = not_replaced(steps)
        return LoggedScalar(steps[kept], values[kept])


class _TaggedRun:
    """The numbers of one clipper, of which those of one step may come one by one."""

    def __init__(self, name: str) -> None:
        self._builder = RunBuilder(name)
        self._step = -1
        self._quantities: dict[str, float] = {}
        self._by_field: dict[str, dict[str, float]] = {}
        self._sentence: str | None = None
        self._is_added = True
        self._skip_totals = [(-1, 0.0)]

    def add(self, tag: Tag, step: int, number: float) -> None:
        numbers = self._numbers(tag)
        if step != self._step or tag.name in numbers:
            self._add_step()
            self._step, self._quantities, self._by_field, self._sentence = step, {}, {}, None
            numbers = self._numbers(tag)
        numbers[tag.name] = number
        self._is_added = False

    def say(self, step: int, sentence: str) -> None:
        if step == self._step:
            self._sentence = sentence
            self._is_added = False

    def _numbers(self, tag: Tag) -> dict[str, float]:
        """Return the numbers of the step so far to which a tag belongs."""
        if tag.field is None:
            return self._quantities
        return self._by_field.setdefault(tag.field, {})

    def so_far(self) -> RunBuilder:
        """Return the steps so far; of a step that goes on, the last entry counts."""
        self._add_step()
        return self._builder

    def _add_step(self) -> None:
        numbers = self._quantities
        norm = numbers.get("pre", numbers.get(PLAIN))
        if self._is_added or norm is None:
            return
        self._is_added = True
        post, threshold = numbers.get("post", math.nan), numbers.get("threshold", math.nan)
        loss = as_logged_loss(numbers["loss"]) if "loss" in numbers else math.nan
        skipped = self._is_skipped(self._step, numbers.get("skipped_steps", 0.0))
        row = (self._step, norm, post, threshold, skipped, loss)
        self._builder.add_step(row, self._by_field, self._sentence)

    def _is_skipped(self, step: int, total: float) -> bool:
        """Return whether the number of skipped steps rose at a step, and remember it.

        Only the running total is logged. A resumed run logs some steps again, so the totals of
        steps that it replaces are dropped first.
        """
        totals = self._skip_totals
        while totals[-1][0] >= step >= 0:  # a negative step of a damaged file drops nothing
            totals.pop()
        rose = total > totals[-1][1]
        totals.append((step, total))
        return rose
