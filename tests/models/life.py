"""A clipper's life in plain Python, written from the documentation; it calls nothing of gradclip.

The scopes say besides what a clipper is given to have them.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from gradclip import GradClipError, NonFiniteGradientError, Scope, SkipLimitError
from tests.models.rules import INF, Rule, model_norm

LR = 0.5
ABSENT = "absent"
"""The ``max_norm`` of a group that has no such key."""


# Which gradients share a norm


def by_size(name: str, parameter: Tensor) -> int | None:
    return parameter.numel() % 2 if parameter.dim() else None


def by_index(name: str, parameter: Tensor) -> Any:
    if not parameter.dim():
        return "number"
    return [None if index == 1 else index for index in range(len(parameter))] or "empty"


def is_a_pair(name: str, parameter: Tensor) -> bool:
    return parameter.numel() == 2


SCOPES: dict[str, Any] = {
    **{name: name for name in ("global", "group", "parameter", "unit")},
    "by size": by_size,
    "by index": by_index,
    "without some": Scope("parameter", exclude=is_a_pair),
    "all but some": Scope("global", exclude=is_a_pair),
}


def labels_of(scope: str, name: str, group: str, parameter: Tensor) -> list[str | None]:
    """What the scope calls a parameter: one label or None, or one for each index."""
    if scope in ("by size", "by index"):
        found = SCOPES[scope](name, parameter)
        labels = found if isinstance(found, list) else [found]
        return [None if label is None else str(label) for label in labels]
    if scope == "unit" and parameter.dim() > 1:
        return [f"{name}[{index}]" for index in range(len(parameter))]
    if scope in ("without some", "all but some") and is_a_pair(name, parameter):
        return [None]
    return [{"global": "global", "all but some": "global", "group": group}.get(scope, name)]


# The model


@dataclass(eq=False)
class Weight:
    """A parameter as the model has it."""

    parameter: nn.Parameter
    name: str
    group: int
    values: list[float] = field(default_factory=list)
    gradient: list[float] | None = None
    momentum: list[float] | None = None
    rows: list[int | None] | None = None
    """Indices of its norms, one or one a row; None until it is labelled."""

    @property
    def counts(self) -> bool:
        """Whether it is in some norm."""
        return any(index is not None for index in self.rows or ())

    def norm_indices(self) -> list[int | None]:
        """For each element the index of its norm."""
        rows = self.rows or [None]
        return [index for index in rows for _ in range(self.parameter.numel() // len(rows))]


class Options(NamedTuple):
    """How a clipper is attached."""

    rule: str
    scope: str
    norm_type: float
    max_value: float | None
    exceed: str
    nonfinite: str
    skip_limit: int | None
    flush_every: int
    per_parameter: str | int


@dataclass
class Counters:
    clipped: int = 0
    finite: int = 0
    nonfinite_steps: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    @property
    def clip_rate(self) -> float:
        return self.clipped / self.finite if self.finite else 0.0


class Found(NamedTuple):
    """What one evaluation's gradients are, before anything is written."""

    norms: list[float]
    bounded: list[float | None]
    """The finite norms with ``max_value`` applied, where an element exceeds it."""
    thresholds: list[float]
    present: set[int | None]
    """Indices of the norms with a gradient behind them."""
    by_parameter: dict[str, float]


class Decision(NamedTuple):
    """What is done about them."""

    found: Found
    skip: bool
    error: type[GradClipError] | None
    factors: list[float]
    """Of the scaling after ``max_value``."""
    coefficients: list[float]
    """By how much norms shrink in all."""


class Life:
    """What the README and the docstrings say of one clipper."""

    def __init__(self, options: Options, rule: Rule, weights: list[Weight], keys: list[Any]):
        self.options, self.rule, self.weights = options, rule, weights
        self.kept_keys: list[Any] = []
        self.warned: set[tuple[int, Any]] = set()
        self.table: dict[tuple[bool, str], float | None] = {}
        """The thresholds of groups, None where the rule gives it, by that and the label."""
        self.attached = True
        self.steps = 0
        self.counters = Counters()
        self.rows: list[dict[str, Any]] = []
        self.last: dict[str, Any] | None = None
        for weight in weights:
            weight.rows = None
        self.relabel(keys)

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.table]

    @property
    def ruled(self) -> list[int]:
        return [index for index, (is_ruled, _) in enumerate(self.table) if is_ruled]

    def relabel(self, keys: list[Any]) -> None:
        """Label what is new; the keys of groups are read when these are first seen."""
        self.kept_keys += keys[len(self.kept_keys) :]
        if not any(weight.counts for weight in self.weights):
            self.table = {}  # there was a norm of nothing
        for weight in self.weights:
            if weight.rows is None:
                weight.rows = self._rows_of(weight)
        if not self.table:
            self._index_of("global")
        self.rule.start(tuple(self.labels[index] for index in self.ruled))

    def _rows_of(self, weight: Weight) -> list[int | None]:
        key, group = self.kept_keys[weight.group], f"group {weight.group}"
        if key is not ABSENT:
            return [None if key is None else self._index_of(group, key)]
        labels = labels_of(self.options.scope, weight.name, group, weight.parameter)
        return [None if label is None else self._index_of(label) for label in labels]

    def _index_of(self, label: str, limit: float | None = None) -> int:
        self.table.setdefault((limit is None, label), limit)
        return [*self.table].index((limit is None, label))

    def gradients(self) -> Iterator[Weight]:
        """Yield the parameters whose gradients are in some norm, of a shared one the first."""
        seen = set()
        for weight in self.weights:
            if weight.gradient is not None and weight.counts and id(weight.gradient) not in seen:
                seen.add(id(weight.gradient))
                yield weight

    def measure(self) -> Found:
        """Measure the gradients and ask the rule."""
        order, bound = self.options.norm_type, self.options.max_value
        elements: list[list[float]] = [[] for _ in self.table]
        present, by_parameter = set(), {}
        for weight in self.gradients():
            each = zip(weight.gradient or (), weight.norm_indices(), strict=True)
            pairs = [(value, index) for value, index in each if index is not None]
            for value, index in pairs:
                elements[index].append(value)
            present.update(weight.rows or ())
            by_parameter[weight.name] = model_norm([value for value, _ in pairs], order)
        norms = [model_norm(values, order) for values in elements]
        bounded = [
            model_norm([min(abs(value), bound) for value in values], order)
            if bound is not None and norm < INF and any(abs(value) > bound for value in values)
            else None
            for norm, values in zip(norms, elements, strict=True)
        ]
        return Found(norms, bounded, self.thresholds_of(norms), present, by_parameter)

    def thresholds_of(self, norms: list[float]) -> list[float]:
        ruled = [norms[index] for index in self.ruled]
        asked = iter(self.rule.thresholds(ruled, self.steps, self.options.norm_type))
        return [next(asked) if limit is None else limit for limit in self.table.values()]

    def decide(self, found: Found) -> Decision:
        """Say what is done about gradients."""
        options, ones = self.options, [1.0 for _ in found.norms]
        each = zip(found.norms, found.bounded, strict=True)
        after = [norm if bounded is None else bounded for norm, bounded in each]
        unfit = not all(map(math.isfinite, found.norms))
        exceeds = any(limit < b < INF for b, limit in zip(after, found.thresholds, strict=True))
        unfit_skips, exceed_skips = options.nonfinite in ("skip", "raise"), options.exceed == "skip"
        if options.exceed != "observe" and ((unfit and unfit_skips) or (exceeds and exceed_skips)):
            return Decision(found, True, self._error(unfit), ones, ones)
        erased = 0.0 if options.nonfinite == "zero" else 1.0
        factors = [
            (limit / b if b > limit else 1.0) if b < INF else erased
            for b, limit in zip(after, found.thresholds, strict=True)
        ]
        coefficients = [
            factor * (b / norm if 0 < norm < INF else 1.0)
            for factor, b, norm in zip(factors, after, found.norms, strict=True)
        ]
        return Decision(found, False, None, factors, coefficients)

    def _error(self, unfit: bool) -> type[GradClipError] | None:
        limit = self.options.skip_limit
        if unfit and self.options.nonfinite == "raise":
            return NonFiniteGradientError
        if limit is not None and self.counters.skipped_in_a_row + 1 >= limit:
            return SkipLimitError
        return None

    def write(self, decision: Decision) -> set[int]:
        """Change the gradients; return the ids of those that may be written at all."""
        written: set[int] = set()
        if decision.skip or self.options.exceed == "observe":
            return written
        for weight in self.gradients():
            gradient = weight.gradient or []
            for place, index in enumerate(weight.norm_indices()):
                if index is None:
                    continue
                value, factor = gradient[place], decision.factors[index]
                if self.options.max_value is not None and decision.found.norms[index] < INF:
                    value = max(min(value, self.options.max_value), -self.options.max_value)
                value = value * factor if factor else 0.0
                if factor < 1 or value != gradient[place]:
                    written.add(id(gradient))
                    gradient[place] = value
        return written

    def finish(self, decision: Decision) -> None:
        """Record the step, and let the rule learn."""
        (norms, _, limits, present, by_parameter), skip = decision.found, decision.skip
        coefficients, finite = decision.coefficients, list(map(math.isfinite, norms))
        clipped = [n * c if c else 0.0 for n, c in zip(norms, coefficients, strict=True)]
        counters = self.counters
        counters.clipped += sum(c < 1 for c, f in zip(coefficients, finite, strict=True) if f)
        counters.finite += sum(finite)
        counters.nonfinite_steps += not all(finite)
        counters.skipped_steps += skip
        counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if skip else 0
        self.last = {
            "step": self.steps,
            "norm": norms,
            "clipped_norm": clipped,
            "threshold": limits,
            "coefficient": coefficients,
            "nonfinite": [not each for each in finite],
        }
        self.rows.append(
            {
                "step": self.steps,
                "norm": self._whole(norms),
                "clipped_norm": self._whole(clipped),
                "threshold": limits[0] if len(limits) == 1 and limits[0] < INF else None,
                "coefficient": min(coefficients),
                "nonfinite": not all(finite),
                "skipped": skip,
                "clip_rate": counters.clip_rate,
                "nonfinite_steps": counters.nonfinite_steps,
                "skipped_steps": counters.skipped_steps,
                "parameter_norms": by_parameter or None,
            }
        )
        states = self.rule.states
        for place, index in enumerate(self.ruled):
            if index in present and finite[index]:
                after = min(norms[index], limits[index]) if skip else clipped[index]
                states[place] = self.rule.learned(states[place], norms[index], after)
        self.steps += 1

    def _whole(self, norms: list[float]) -> float:
        return norms[0] if len(norms) == 1 else model_norm(norms, self.options.norm_type)

    def lost_keys(self, keys: list[Any]) -> bool:
        """Tell whether there is something new to warn of, and remember it."""
        lost = {
            (index, None if key is ABSENT else (key,))
            for index, (key, kept) in enumerate(zip(keys, self.kept_keys, strict=False))
            if key != kept
        }
        new = lost - self.warned
        self.warned |= lost
        return bool(new)

    def saved(self) -> dict[str, Any]:
        states = None if self.rule.fresh is None else self.rule.states
        of_whom = (self.labels, type(self.rule).__name__, states and len(states))
        return copy.deepcopy(
            {"steps": self.steps, "counters": self.counters, "states": states, "of whom": of_whom}
        )

    def fits(self, saved: dict[str, Any]) -> bool:
        return saved["of whom"] == self.saved()["of whom"]

    def load(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.steps, self.counters = saved["steps"], saved["counters"]
        if saved["states"] is not None:
            self.rule.states = saved["states"]


def sgd_step(weight: Weight, momentum: float, decay: float) -> list[float]:
    """Take SGD's step with one parameter; return what its new values may be off by."""
    margins, directions, before = [], [], weight.momentum
    for place, (value, gradient) in enumerate(
        zip(weight.values, weight.gradient or (), strict=True)
    ):
        direction, size = gradient + decay * value, abs(gradient) + decay * abs(value)
        if momentum and before is not None:
            direction, size = momentum * before[place] + direction, size + abs(before[place])
        directions.append(direction)
        margins.append(abs(value) + size)
        weight.values[place] = value - LR * direction
    if momentum:
        weight.momentum = directions
    return margins
