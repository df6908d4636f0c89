"""A clipper's life in plain Python, written from the documentation; it calls nothing of gradclip.

The rules and scopes say besides what a clipper is given to have them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradclip import (
    GradClipError,
    NonFiniteGradientError,
    Scope,
    SkipLimitError,
    thresholds,
)

INF, NAN = math.inf, math.nan
LR = 0.5
ABSENT = "absent"
"""The ``max_norm`` of a group that has no such key."""


# What a rule allows, and what it learns


class Rule:
    """A rule for the largest norm, with a state for each norm that it rules."""

    real: Callable[[], Any]
    """Makes what the clipper is given."""
    name = "Fixed"
    """What a saved state calls it."""
    fresh: Any = None
    """The state of a norm that has seen nothing; None for a rule that learns nothing."""

    def __init__(self) -> None:
        self.labels: tuple[str, ...] = ()
        self.states: list[Any] = []

    def start(self, labels: tuple[str, ...]) -> None:
        """Begin with these labels, or go on where they begin with those before."""
        if labels[: len(self.labels)] != self.labels:
            self.states = []
        self.states += [copy.deepcopy(self.fresh) for _ in labels[len(self.states) :]]
        self.labels = labels

    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        return [self.threshold(state, norm) for state, norm in zip(self.states, norms, strict=True)]

    def threshold(self, state: Any, norm: float) -> float:
        raise NotImplementedError

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        """Return the state after a finite norm with a gradient behind it."""
        return state


class Number(Rule):
    """A number, or None for no threshold."""

    def __init__(self, number: float | None) -> None:
        super().__init__()
        self.real = lambda: number
        self._number = INF if number is None else number

    def threshold(self, state: None, norm: float) -> float:
        return self._number


class Plan(Rule):
    name = "Schedule"

    def real(self) -> Callable[[int], float | None]:
        return lambda step: None if step % 4 == 3 else 1.0 + step % 3

    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        return [INF if step % 4 == 3 else 1.0 + step % 3] * len(norms)


class ZScore(Rule):
    name = "ZScore"
    fresh = ((), None, None)  # the norms of the warm-up, mean, variance

    def real(self) -> Any:
        return thresholds.ZScore(0.5, decay=0.5, warmup=2, eps=1e-3)

    def threshold(self, state: Any, norm: float) -> float:
        _, mean, variance = state
        if not mean:
            return INF
        deviation = math.sqrt(variance)
        score = (norm - mean) / (deviation + 1e-3)
        return mean + 0.5 * 0.5 * deviation / score if score > 0.5 else INF

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        first, mean, variance = state
        if mean is None:
            first = (*first, norm)
            if len(first) < 2:
                return first, None, None
            mean = math.fsum(first) / 2
            return first, mean, bounded_square(first[0] - mean)
        own = min(norm, self.threshold(state, norm))
        mean = 0.5 * mean + 0.5 * own
        return first, mean, 0.5 * variance + 0.5 * bounded_square(own - mean)


class Percentile(Rule):
    name = "Percentile"
    fresh: tuple[float, ...] = ()

    def real(self) -> Any:
        return thresholds.Percentile(30, window=4, floor=0.25, cap=100.0)

    def threshold(self, state: tuple[float, ...], norm: float) -> float:
        norms = sorted((*state, norm)) if norm < INF else sorted(state)
        if not norms:
            return 100.0
        rank = (len(norms) - 1) * 0.3
        below, above = norms[int(rank)], norms[min(int(rank) + 1, len(norms) - 1)]
        return min(max(below + (above - below) * (rank % 1), 0.25), 100.0)

    def learned(self, state: tuple[float, ...], norm: float, clipped: float) -> Any:
        return (*state, norm)[-3:]


class Growth(Rule):
    name = "GrowthLimit"
    fresh = 0.0

    def real(self) -> Any:
        return thresholds.GrowthLimit(1.25)

    def threshold(self, state: float, norm: float) -> float:
        return 1.25 * state if state else INF

    def learned(self, state: float, norm: float, clipped: float) -> float:
        return clipped or state


class Average(Rule):
    name = "MovingAverage"
    fresh = (0, 0.0)

    def real(self) -> Any:
        return thresholds.MovingAverage(1.25, decay=0.75, warmup=2, warmup_norm=3.0)

    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        whole = model_norm([norm for norm in norms if norm < INF], order)
        warm = [3.0 * norm / whole if whole > 3.0 else INF for norm in norms]
        each = zip(self.states, warm, strict=True)
        return [shared if count < 2 else 1.25 * average for (count, average), shared in each]

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        count, average = state
        if not clipped:
            return state
        if count >= 2:
            return count + 1, 0.75 * average + 0.25 * clipped
        return count + 1, min(average, clipped) if count else clipped


RULES: dict[str, Callable[[], Rule]] = {
    "one": lambda: Number(1.0),
    "five": lambda: Number(5.0),
    "zero": lambda: Number(0),
    "nothing": lambda: Number(None),
    "plan": Plan,
    "z-score": ZScore,
    "percentile": Percentile,
    "growth": Growth,
    "average": Average,
}


def model_norm(values: Sequence[float], order: float) -> float:
    """The norm; NaN where one of the values is, infinite where the power sum is."""
    magnitudes = [abs(value) for value in values]
    if any(map(math.isnan, magnitudes)):
        return NAN
    if order == INF or INF in magnitudes:
        return max(magnitudes, default=0.0)
    try:
        return math.fsum(magnitude**order for magnitude in magnitudes) ** (1 / order)
    except OverflowError:
        return INF


def bounded_square(value: float) -> float:
    return min(value * value, torch.finfo(torch.float64).max)


# Which gradients share a norm


def by_size(name: str, parameter: Tensor) -> int | None:
    return parameter.numel() % 2 if parameter.dim() else None


def by_index(name: str, parameter: Tensor) -> Any:
    return [None if index == 1 else index for index in range(len(parameter))] or "empty"


SCOPES: dict[str, Any] = {
    "global": "global",
    "group": "group",
    "parameter": "parameter",
    "unit": "unit",
    "by size": by_size,
    "by index": lambda name, p: by_index(name, p) if p.dim() else "number",
    "without some": Scope("parameter", exclude=lambda name, p: p.numel() == 2),
    "all but some": Scope("global", exclude=lambda name, p: p.numel() == 2),
}


def labels_of(scope: str, name: str, group: str, shape: tuple[int, ...]) -> Any:
    """What the scope calls a parameter: one label, None, or one for each index."""
    rows, count = shape[0] if shape else 0, math.prod(shape)
    if scope == "unit":
        return [f"{name}[{index}]" for index in range(rows)] if len(shape) > 1 else name
    if scope == "by size":
        return str(count % 2) if shape else None
    if scope == "by index":
        if not rows:
            return "empty" if shape else "number"
        return [None if index == 1 else str(index) for index in range(rows)]
    if scope in ("without some", "all but some") and count == 2:
        return None
    return {"global": "global", "all but some": "global", "group": group}.get(scope, name)


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
    norm_index: Any = ABSENT
    """Index of its norm, None, or a list for its rows; absent until it is labelled."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def norm_indices(self) -> list[int | None]:
        """For each element the index of its norm."""
        if not isinstance(self.norm_index, list):
            return [self.norm_index] * math.prod(self.shape)
        size = math.prod(self.shape[1:])
        return [index for index in self.norm_index for _ in range(size)]


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
    bounded: list[float]
    """The norms with ``max_value`` applied, where an element exceeds it; else NaN."""
    thresholds: list[float]
    present: list[bool]
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
        self.options = options
        self.rule = rule
        self.weights = weights
        self.kept_keys: list[Any] = []
        self.warned: set[tuple[int, Any]] = set()
        self.table: dict[tuple[bool, str], int] = {}
        self.group_thresholds: list[float | None] = []
        self.known: set[int] = set()
        self.attached = True
        self.steps = 0
        self.counters = Counters()
        self.rows: list[dict[str, Any]] = []
        self.last: dict[str, Any] | None = None
        for weight in weights:
            weight.norm_index = ABSENT
        self.relabel(keys)

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.table]

    @property
    def ruled(self) -> list[int]:
        return [index for index, limit in enumerate(self.group_thresholds) if limit is None]

    def relabel(self, keys: list[Any]) -> None:
        """Label what is new; the keys of groups are read when these are first seen."""
        self.kept_keys += keys[len(self.kept_keys) :]
        if all(weight.norm_index in (None, ABSENT) for weight in self.weights):
            self.table, self.group_thresholds = {}, []  # there was a norm of nothing
        for weight in self.weights:
            if weight.norm_index is ABSENT:
                weight.norm_index = self._norm_index_of(weight)
        if not self.table:
            self._index_of("global", None)
        self.rule.start(tuple(self.labels[index] for index in self.ruled))

    def _norm_index_of(self, weight: Weight) -> Any:
        key, group = self.kept_keys[weight.group], f"group {weight.group}"
        if key is None:
            return None
        if key is not ABSENT:
            return self._index_of(group, key)
        labels = labels_of(self.options.scope, weight.name, group, weight.shape)
        if isinstance(labels, list):
            return [None if label is None else self._index_of(label, None) for label in labels]
        return None if labels is None else self._index_of(labels, None)

    def _index_of(self, label: str, limit: float | None) -> int:
        index = self.table.setdefault((limit is None, label), len(self.table))
        self.group_thresholds += [limit] * (len(self.table) - len(self.group_thresholds))
        return index

    def gradients(self) -> Iterator[Weight]:
        """Yield the parameters whose gradients are in some norm, of a shared one the first."""
        seen = set()
        for weight in self.weights:
            if weight.gradient is not None and id(weight.gradient) not in seen:
                if weight.norm_index is None:
                    continue
                seen.add(id(weight.gradient))
                yield weight

    def measure(self) -> Found:
        """Measure the gradients and ask the rule."""
        order, bound = self.options.norm_type, self.options.max_value
        elements: list[list[float]] = [[] for _ in self.table]
        present = [False for _ in self.table]
        by_parameter = {}
        for weight in self.gradients():
            own = []
            for value, index in zip(weight.gradient or (), weight.norm_indices(), strict=True):
                if index is not None:
                    elements[index].append(value)
                    own.append(value)
            for index in (
                weight.norm_index if isinstance(weight.norm_index, list) else [weight.norm_index]
            ):
                if index is not None:
                    present[index] = True
            by_parameter[weight.name] = model_norm(own, order)
        norms = [model_norm(values, order) for values in elements]
        bounded = [
            model_norm([min(abs(value), bound) for value in values], order)
            if bound is not None and any(abs(value) > bound for value in values)
            else NAN
            for values in elements
        ]
        return Found(norms, bounded, self.thresholds_of(norms), present, by_parameter)

    def thresholds_of(self, norms: list[float]) -> list[float]:
        asked = self.rule.thresholds(
            [norms[i] for i in self.ruled], self.steps, self.options.norm_type
        )
        limits = [INF if limit is None else limit for limit in self.group_thresholds]
        for index, limit in zip(self.ruled, asked, strict=True):
            limits[index] = limit
        return limits

    def decide(self, found: Found) -> Decision:
        """Say what is done about gradients."""
        options, writes = self.options, self.options.exceed != "observe"
        each = list(zip(found.norms, found.bounded, found.thresholds, strict=True))
        after = [norm if math.isnan(bounded) else bounded for norm, bounded, _ in each]
        after = [b if math.isfinite(n) else n for b, n in zip(after, found.norms, strict=True)]
        unfit = not all(map(math.isfinite, found.norms))
        exceeds = any(
            b > limit for b, limit in zip(after, found.thresholds, strict=True) if b < INF
        )
        skip = (unfit and options.nonfinite in ("skip", "raise")) or (
            exceeds and options.exceed == "skip"
        )
        if not writes:
            skip = False
        if skip:
            ones = [1.0 for _ in after]
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
            gradient = weight.gradient
            assert gradient is not None
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
        found, skip = decision.found, decision.skip
        coefficients, norms = decision.coefficients, found.norms
        finite = list(map(math.isfinite, norms))
        clipped = [n * c if c else 0.0 for n, c in zip(norms, coefficients, strict=True)]
        counters = self.counters
        counters.clipped += sum(c < 1 for c, f in zip(coefficients, finite, strict=True) if f)
        counters.finite += sum(finite)
        counters.nonfinite_steps += not all(finite)
        counters.skipped_steps += skip
        counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if skip else 0
        order = self.options.norm_type
        total = norms[0] if len(norms) == 1 else model_norm(norms, order)
        only = found.thresholds[0] if len(norms) == 1 and found.thresholds[0] < INF else None
        self.last = {
            "step": self.steps,
            "norm": norms,
            "clipped_norm": clipped,
            "threshold": found.thresholds,
            "coefficient": coefficients,
            "nonfinite": [not each for each in finite],
        }
        self.rows.append(
            {
                "step": self.steps,
                "norm": total,
                "clipped_norm": clipped[0] if len(clipped) == 1 else model_norm(clipped, order),
                "threshold": only,
                "coefficient": min(coefficients),
                "nonfinite": not all(finite),
                "skipped": skip,
                "clip_rate": counters.clip_rate,
                "nonfinite_steps": counters.nonfinite_steps,
                "skipped_steps": counters.skipped_steps,
                "parameter_norms": found.by_parameter or None,
            }
        )
        held = [min(n, limit) for n, limit in zip(norms, found.thresholds, strict=True)]
        for place, index in enumerate(self.ruled):
            if found.present[index] and finite[index]:
                after = held[index] if skip else clipped[index]
                state = self.rule.states[place]
                self.rule.states[place] = self.rule.learned(state, norms[index], after)
        self.steps += 1

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
        return copy.deepcopy(
            {
                "steps": self.steps,
                "counters": self.counters,
                "labels": self.labels,
                "name": self.rule.name,
                "states": self.rule.states if self.rule.fresh is not None else None,
            }
        )

    def fits(self, saved: dict[str, Any]) -> bool:
        own = self.saved()
        alike = all(saved[key] == own[key] for key in ("labels", "name"))
        return alike and len(saved["states"] or ()) == len(own["states"] or ())

    def load(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.steps, self.counters = saved["steps"], saved["counters"]
        if saved["states"] is not None:
            self.rule.states = saved["states"]


def sgd_step(weight: Weight, momentum: float, decay: float) -> list[float]:
    """Take SGD's step with one parameter; return what its new values may be off by."""
    margins = []
    values, before = weight.values, weight.momentum
    directions = []
    for place, (value, gradient) in enumerate(zip(values, weight.gradient or (), strict=True)):
        direction, size = gradient + decay * value, abs(gradient) + decay * abs(value)
        if momentum and before is not None:
            direction, size = momentum * before[place] + direction, size + abs(before[place])
        directions.append(direction)
        margins.append(abs(value) + size)
        values[place] = value - LR * direction
    if momentum:
        weight.momentum = directions
    return margins
