"""A clipper's whole life in any order of events, beside a model of it in plain Python.

The model is written from the documentation and calls nothing of gradclip. It adopts each norm and
threshold that a step has measured once that is near its own, so that a decision at the threshold
is compared exactly.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from gradclip import (
    ArgumentError,
    AttachError,
    GradClipError,
    GradientClipper,
    GradientError,
    MemorySink,
    NonFiniteGradientError,
    Scope,
    SkipLimitError,
    StateError,
    thresholds,
)

INF, NAN = math.inf, math.nan
F64, F32 = torch.float64, torch.float32
UNIT = {F64: 2.0**-53, F32: 2.0**-24}
SMALLEST = {F64: 2.0**-1074, F32: 2.0**-149}
ACCURACY = {F64: 1e-12, F32: 1e-6}
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

    def limits(self, norms: list[float], step: int, order: float) -> list[float]:
        return [self.limit(state, norm) for state, norm in zip(self.states, norms, strict=True)]

    def limit(self, state: Any, norm: float) -> float:
        raise NotImplementedError

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        """Return the state after a finite norm with a gradient behind it."""
        return state


class Number(Rule):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.real = lambda: limit
        self._limit = limit

    def limit(self, state: None, norm: float) -> float:
        return self._limit


class Nothing(Rule):
    def real(self) -> None:
        return None

    def limit(self, state: None, norm: float) -> float:
        return INF


class Plan(Rule):
    name = "Schedule"

    def real(self) -> Callable[[int], float | None]:
        return lambda step: None if step % 4 == 3 else 1.0 + step % 3

    def limits(self, norms: list[float], step: int, order: float) -> list[float]:
        return [INF if step % 4 == 3 else 1.0 + step % 3] * len(norms)


class ZScore(Rule):
    name = "ZScore"
    fresh = ((), None, None)  # the norms of the warm-up, mean, variance

    def real(self) -> Any:
        return thresholds.ZScore(0.5, decay=0.5, warmup=2, eps=1e-3)

    def limit(self, state: Any, norm: float) -> float:
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
        own = min(norm, self.limit(state, norm))
        mean = 0.5 * mean + 0.5 * own
        return first, mean, 0.5 * variance + 0.5 * bounded_square(own - mean)


class Percentile(Rule):
    name = "Percentile"
    fresh: tuple[float, ...] = ()

    def real(self) -> Any:
        return thresholds.Percentile(30, window=4, floor=0.25, cap=100.0)

    def limit(self, state: tuple[float, ...], norm: float) -> float:
        seen = sorted((*state, norm)) if norm < INF else sorted(state)
        if not seen:
            return 100.0
        place = (len(seen) - 1) * 0.3
        below = seen[int(place)]
        above = seen[min(int(place) + 1, len(seen) - 1)]
        return min(max(below + (above - below) * (place % 1), 0.25), 100.0)

    def learned(self, state: tuple[float, ...], norm: float, clipped: float) -> Any:
        return (*state, norm)[-3:]


class Growth(Rule):
    name = "GrowthLimit"
    fresh = 0.0

    def real(self) -> Any:
        return thresholds.GrowthLimit(1.25)

    def limit(self, state: float, norm: float) -> float:
        return 1.25 * state if state else INF

    def learned(self, state: float, norm: float, clipped: float) -> float:
        return clipped or state


class Average(Rule):
    name = "MovingAverage"
    fresh = (0, 0.0)

    def real(self) -> Any:
        return thresholds.MovingAverage(1.25, decay=0.75, warmup=2, warmup_norm=3.0)

    def limits(self, norms: list[float], step: int, order: float) -> list[float]:
        whole = norm_of([norm for norm in norms if norm < INF], order)
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


class Deviation(Rule):
    fresh: tuple[float, ...] = ()
    name = "MedianDeviation"

    def real(self) -> Any:
        return thresholds.MedianDeviation(1.5, window=5, warmup=4)

    def limit(self, state: tuple[float, ...], norm: float) -> float:
        if len(state) < 3 or not (middle := statistics.median(state)):
            return INF
        return middle + 1.5 * statistics.median([abs(each - middle) for each in state])

    def learned(self, state: tuple[float, ...], norm: float, clipped: float) -> Any:
        return (*state, norm)[-5:]


RULES: dict[str, Callable[[], Rule]] = {
    "one": lambda: Number(1.0),
    "five": lambda: Number(5.0),
    "zero": lambda: Number(0),
    "nothing": Nothing,
    "plan": Plan,
    "z-score": ZScore,
    "percentile": Percentile,
    "growth": Growth,
    "average": Average,
    "deviation": Deviation,
}


def norm_of(values: Sequence[float], order: float) -> float:
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
    return min(value * value, torch.finfo(F64).max)


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
    place: Any = ABSENT
    """The index of its norm, None, or those of its rows; absent until it is labelled."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def norm_indices(self) -> list[int | None]:
        """For each element the index of its norm."""
        if not isinstance(self.place, list):
            return [self.place] * math.prod(self.shape)
        size = math.prod(self.shape[1:])
        return [index for index in self.place for _ in range(size)]


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
    limits: list[float]
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
        self.own_limits: list[float | None] = []
        self.known: set[int] = set()
        self.attached = True
        self.steps = 0
        self.counters = Counters()
        self.rows: list[dict[str, Any]] = []
        self.history: list[float] = []
        """The total norms that the next one is held against."""
        self.last: dict[str, Any] | None = None
        for weight in weights:
            weight.place = ABSENT
        self.relabel(keys)

    @property
    def labels(self) -> list[str]:
        return [label for _, label in self.table]

    @property
    def ruled(self) -> list[int]:
        return [index for index, limit in enumerate(self.own_limits) if limit is None]

    def relabel(self, keys: list[Any]) -> None:
        """Label what is new; the keys of groups are read when these are first seen."""
        self.kept_keys += keys[len(self.kept_keys) :]
        if all(weight.place in (None, ABSENT) for weight in self.weights):
            self.table, self.own_limits = {}, []  # there was a norm of nothing
        for weight in self.weights:
            if weight.place is ABSENT:
                weight.place = self._place_of(weight)
        if not self.table:
            self._index_of("global", None)
        self.rule.start(tuple(self.labels[index] for index in self.ruled))

    def _place_of(self, weight: Weight) -> Any:
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
        self.own_limits += [limit] * (len(self.table) - len(self.own_limits))
        return index

    def gradients(self) -> Iterator[Weight]:
        """Yield the parameters whose gradients are in some norm, of a shared one the first."""
        seen = set()
        for weight in self.weights:
            if weight.gradient is not None and id(weight.gradient) not in seen:
                if weight.place is None:
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
            for index in weight.place if isinstance(weight.place, list) else [weight.place]:
                if index is not None:
                    present[index] = True
            by_parameter[weight.name] = norm_of(own, order)
        norms = [norm_of(values, order) for values in elements]
        bounded = [
            norm_of([min(abs(value), bound) for value in values], order)
            if bound is not None and any(abs(value) > bound for value in values)
            else NAN
            for values in elements
        ]
        return Found(norms, bounded, self._limits(norms), present, by_parameter)

    def _limits(self, norms: list[float]) -> list[float]:
        asked = self.rule.limits([norms[i] for i in self.ruled], self.steps, self.options.norm_type)
        limits = [INF if limit is None else limit for limit in self.own_limits]
        for index, limit in zip(self.ruled, asked, strict=True):
            limits[index] = limit
        return limits

    def decide(self, found: Found) -> Decision:
        """Say what is done about gradients."""
        options, writes = self.options, self.options.exceed != "observe"
        each = list(zip(found.norms, found.bounded, found.limits, strict=True))
        after = [norm if math.isnan(bounded) else bounded for norm, bounded, _ in each]
        after = [b if math.isfinite(n) else n for b, n in zip(after, found.norms, strict=True)]
        unfit = not all(map(math.isfinite, found.norms))
        exceeds = any(b > limit for b, limit in zip(after, found.limits, strict=True) if b < INF)
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
            for b, limit in zip(after, found.limits, strict=True)
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
        total = norms[0] if len(norms) == 1 else norm_of(norms, order)
        only = found.limits[0] if len(norms) == 1 and found.limits[0] < INF else None
        self.last = {
            "step": self.steps,
            "norm": norms,
            "clipped_norm": clipped,
            "threshold": found.limits,
            "coefficient": coefficients,
            "nonfinite": [not each for each in finite],
        }
        self.rows.append(
            {
                "step": self.steps,
                "norm": total,
                "clipped_norm": clipped[0] if len(clipped) == 1 else norm_of(clipped, order),
                "threshold": only,
                "coefficient": min(coefficients),
                "nonfinite": not all(finite),
                "skipped": skip,
                "clip_rate": counters.clip_rate,
                "nonfinite_steps": counters.nonfinite_steps,
                "skipped_steps": counters.skipped_steps,
                "parameter_norms": found.by_parameter or None,
                "incident": self._is_incident(total),
                "before": ", ".join(f"{norm:.4g}" for norm in self.history[-5:]) or "not known",
            }
        )
        self.history.append(total)
        held = [min(n, limit) for n, limit in zip(norms, found.limits, strict=True)]
        for place, index in enumerate(self.ruled):
            if found.present[index] and finite[index]:
                after = held[index] if skip else clipped[index]
                state = self.rule.states[place]
                self.rule.states[place] = self.rule.learned(state, norms[index], after)
        self.steps += 1

    def _is_incident(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return True
        usual = [each for each in self.history if 0 < each < INF][-100:]
        if len(usual) < 20:
            return False
        median = statistics.median(usual)
        away = statistics.median([abs(each - median) for each in usual])
        return norm > median * (1 + 1e-6) and norm > median + 10 * away

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
        self.steps, self.counters, self.history = saved["steps"], saved["counters"], []
        if saved["states"] is not None:
            self.rule.states = saved["states"]


def stepped(weight: Weight, momentum: float, decay: float) -> list[float]:
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


# What hypothesis does with both


class Searching(torch.optim.SGD):
    """Evaluates its closure several times before it steps, as a line search does."""

    evaluations = 1

    def step(self, closure: Any = None) -> Any:
        for _ in range(self.evaluations - 1):
            closure()
        return super().step(closure)


CALM = ["plain"] * 4 + ["uneven"] * 3 + ["small", "large", "zero", "none", "keep", "shared"]
WILD = [*CALM, "huge", "enormous", "tiny", "nan", "inf", "-inf"]
SCALES = {"small": 2.0**-6, "large": 64.0, "huge": 1e30, "uneven": 0.1, "zero": 0.0}
SHAPES = [(2,), (3, 2), (), (0,), (3,), (2, 2)]

some_options = st.builds(
    Options,
    rule=st.sampled_from([*RULES]),
    scope=st.sampled_from([*SCOPES]),
    norm_type=st.sampled_from([2.0, 2.0, 1.0, INF]),
    max_value=st.sampled_from([None, None, 0.75]),
    exceed=st.sampled_from(["scale", "scale", "skip", "observe"]),
    nonfinite=st.sampled_from(["zero", "skip", "raise", "propagate"]),
    skip_limit=st.sampled_from([None, None, 2]),
    flush_every=st.sampled_from([3, 1, 100]),
    per_parameter=st.sampled_from([0, "all"]),
)
some_parameters = st.tuples(st.sampled_from(SHAPES), st.sampled_from([F64, F64, F32]))
some_groups = st.tuples(
    st.lists(some_parameters, min_size=1, max_size=3),
    st.sampled_from([ABSENT, ABSENT, ABSENT, 2.0, None]),
)
some_kinds = [st.tuples(st.sampled_from(kinds), st.integers(0, 6)) for kinds in (CALM, WILD)]
some_gradients = st.one_of(
    *[st.lists(kind, min_size=1, max_size=4) for kind in [*some_kinds[:1] * 2, *some_kinds]]
)
Gradients = list[tuple[str, int]]


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
}
SPOILED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a key is missing": lambda state: state.pop("counters"),
    "a counter is missing": lambda state: state["counters"].pop("skipped_in_a_row"),
    "a count is negative": lambda state: state.update(steps=-1),
    "of another rule": lambda state: state.update(rule="Other"),
    "of other labels": lambda state: state["labels"].append("other"),
    "more in the threshold": lambda state: state["threshold"].update(more=torch.ones(1)),
}
"""What makes a state one that no such clipper has saved."""


@contextmanager
def warns_of_lost_keys(needed: bool) -> Iterator[None]:
    """Fail where there is no warning of keys that were changed, or another, or one too many."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert bool(caught) == needed
    assert all("the clipper keeps the first" in str(each.message) for each in caught)


class Machine(RuleBasedStateMachine):
    """Drives an optimizer with a clipper, and the model of both."""

    # What there is

    @initialize(
        groups=st.lists(some_groups, min_size=1, max_size=2),
        options=some_options,
        naming=st.sampled_from(["model", "places", "given"]),
        kind=st.sampled_from([torch.optim.SGD, Searching]),
        momentum=st.sampled_from([0.0, 0.5]),
        decay=st.sampled_from([0.0, 0.25]),
        way=st.sampled_from([{}, {}, {"foreach": True}, {"fused": True}]),
        watched=st.booleans(),
    )
    def begin(self, groups, options, naming, kind, momentum, decay, way, watched):
        self.module = nn.Module()
        self.naming, self.momentum, self.decay, self.watched = naming, momentum, decay, watched
        self.weights: list[Weight] = []
        self.keys: list[Any] = []
        made = [self._group(*group) for group in groups]
        if momentum and way.get("fused"):
            way = {}  # torch fails once a parameter gets its first gradient after others
        self.optimizer = kind(made, lr=LR, momentum=momentum, weight_decay=decay, **way)
        self.saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.kept: tuple[Any, ...] | None = None
        self.stepping = False
        self._attach(options, RULES[options.rule]())

    def _group(self, parameters: list[Any], key: Any) -> dict[str, Any]:
        """Make a parameter group, in torch and in the model."""
        group, params = len(self.keys), []
        self.keys.append(key)
        for place, (shape, dtype) in enumerate(parameters):
            number = len(self.weights)
            parameter = nn.Parameter(torch.full(shape, 1.0 + number, dtype=dtype))
            name = f"w{number}"
            if self.naming == "model":
                self.module.register_parameter(name, parameter)
            params.append((name, parameter) if self.naming == "given" else parameter)
            shown = f"group {group}, parameter {place}" if self.naming == "places" else name
            values = parameter.detach().flatten().tolist()
            self.weights.append(Weight(parameter, shown, group, values))
        return {"params": params} if key is ABSENT else {"params": params, "max_norm": key}

    def _attach(self, options: Options, model_rule: Rule, real_rule: Any = ABSENT) -> None:
        self.real_rule = model_rule.real() if real_rule is ABSENT else real_rule
        self.sink = MemorySink(flush_every=options.flush_every, per_parameter=options.per_parameter)
        self.clipper = GradientClipper(
            self.optimizer,
            self.real_rule,
            scope=SCOPES[options.scope],
            norm_type=options.norm_type,
            max_value=options.max_value,
            exceed=options.exceed,
            nonfinite=options.nonfinite,
            skip_limit=options.skip_limit,
            model=self.module if self.naming == "model" else None,
            log=self.sink,
        )
        self.life = Life(options, model_rule, self.weights, self.keys)

    @property
    def attached(self) -> bool:
        return self.life.attached

    # Gradients

    def _give(self, gradients: Gradients) -> None:
        for number, weight in enumerate(self.weights):
            kind, shift = gradients[number % len(gradients)]
            self._give_one(weight, kind, shift + number, self.weights[number - 1])

    def _give_one(self, weight: Weight, kind: str, shift: int, other: Weight) -> None:
        parameter = weight.parameter
        if kind == "keep":
            return
        if kind == "none":
            parameter.grad = weight.gradient = None
            return
        alike = (other.shape, other.parameter.dtype) == (weight.shape, parameter.dtype)
        if kind == "shared" and alike:
            parameter.grad, weight.gradient = other.parameter.grad, other.gradient
            return
        dtype = parameter.dtype
        scale = SCALES.get(kind, 1.0)
        if kind == "enormous":
            scale = 1e200 if dtype is F64 else 1e38
        elif kind == "tiny":
            scale = 1e-40 if dtype is F32 else 1e-120
        values = [((3 * i + shift) % 7 - 3) * scale for i in range(parameter.numel())]
        if kind in ("nan", "inf", "-inf") and values:
            values[shift % len(values)] = float(kind)
        parameter.grad = torch.tensor(values, dtype=dtype).reshape(parameter.shape)
        weight.gradient = parameter.grad.flatten().tolist()

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.clipper.zero_grad(set_to_none=to_none)
        for weight in self.weights:
            if to_none:
                weight.gradient = None
            elif weight.gradient is not None:
                weight.gradient[:] = [0.0] * len(weight.gradient)

    # Steps

    @rule(gradients=some_gradients, through=st.sampled_from(["optimizer", "clipper"]))
    def step(self, gradients, through):
        self._give(gradients)
        self._take([], getattr(self, through).step)

    @rule(gradients=some_gradients)
    def step_again(self, gradients):
        """Step often enough for a rule to know what is usual, and for a batch to be full."""
        for shift in range(4):
            self._give([(kind, place + shift) for kind, place in gradients])
            self._take([], self.optimizer.step)

    @rule(
        evaluations=st.lists(some_gradients, min_size=2, max_size=3),
        through=st.sampled_from(["optimizer", "keyword", "clipper"]),
    )
    def step_with_closure(self, evaluations, through):
        # A limit is for steps, and what an evaluation does to it is told by a test below.
        searching = isinstance(self.optimizer, Searching)
        if not searching or self.life.options.skip_limit is not None:
            evaluations = evaluations[-1:]
        if through == "keyword":
            self._take(evaluations, lambda closure: self.optimizer.step(closure=closure))
        else:
            self._take(evaluations, getattr(self, through).step)

    def _take(self, evaluations: list[Gradients], call: Callable[..., Any]) -> None:
        life, called, self.stepping = self.life, 0, True
        found: Found | None = None
        if self.attached:
            life.relabel(self.keys)

        def closure() -> Tensor:
            nonlocal called, found
            if called and found is not None:
                self._compare_gradients(life.write(life.decide(found)))
            self._give(evaluations[called])
            self._note_gradients()
            found = life.measure() if self.attached else None
            called += 1
            return torch.tensor(float(called))

        self.optimizer.evaluations = max(1, len(evaluations))
        raised: GradClipError | None = None
        self._note_gradients()
        try:
            if evaluations:
                loss = call(closure)
                assert loss.item() == called == len(evaluations)
            else:
                found = life.measure() if self.attached else None
                call()
        except GradClipError as error:
            raised = error
        if found is None:
            assert raised is None
            self._compare_gradients(set())
            self._compare_weights(taken=True)
        else:
            self._compare_step(found, raised)
        self._heal()
        self.stepping = False

    def _compare_step(self, found: Found, raised: GradClipError | None) -> None:
        life = self.life
        decision = life.decide(self._adopted(found))
        assert type(raised) is (decision.error or type(None)), (raised, decision)
        assert self.clipper.last.skipped is decision.skip
        if isinstance(raised, NonFiniteGradientError):
            assert f"at step {life.steps}, from " in str(raised)
            self._check_culprits(str(raised))
        self._compare_gradients(life.write(decision))
        life.finish(decision)
        self._compare_weights(taken=not decision.skip)

    def _adopted(self, found: Found) -> Found:
        """Take over what was measured, once it is near what it is by the model."""
        last = self.clipper.last
        norms, limits = last.norms.tolist(), last.thresholds.tolist()
        f32 = any(weight.parameter.dtype is F32 for weight in self.weights)
        accuracy = ACCURACY[F32 if f32 else F64]
        assert all(map(near(accuracy), norms, found.norms)), (norms, found)
        own = found._replace(norms=norms, limits=self.life._limits(norms))
        for limit, needed, norm, there in zip(
            limits, own.limits, norms, found.present, strict=True
        ):
            if there and norm < INF:
                assert near(1e-9)(limit, needed)
        return own._replace(limits=limits)

    def _check_culprits(self, message: str) -> None:
        """Check that every parameter with elements that are not finite is named."""
        for weight in self.life.gradients():
            gradient = weight.gradient or []
            indices = weight.norm_indices()
            bad = [not math.isfinite(value) for value in gradient]
            if any(b and index is not None for b, index in zip(bad, indices, strict=True)):
                assert f"{weight.name} ({sum(bad)} of {len(bad)} elements)" in message

    def _note_gradients(self) -> None:
        grads = [weight.parameter.grad for weight in self.weights]
        self.noted = [(grad, None if grad is None else grad._version) for grad in grads]

    def _compare_gradients(self, written: set[int]) -> None:
        """Compare the gradients with the model's; where nothing was to be written, exactly."""
        for weight, (noted, version) in zip(self.weights, self.noted, strict=True):
            grad = weight.parameter.grad
            assert grad is noted
            if grad is None:
                assert weight.gradient is None
                continue
            assert weight.gradient is not None
            values = grad.flatten().tolist()
            if id(weight.gradient) in written:
                close = near(4 * UNIT[grad.dtype], SMALLEST[grad.dtype])
                assert all(map(close, values, weight.gradient)), (values, weight.gradient)
                weight.gradient[:] = values
            else:
                assert grad._version == version
                assert same(values, weight.gradient)

    def _compare_weights(self, *, taken: bool) -> None:
        for weight in self.weights:
            values = weight.parameter.detach().flatten().tolist()
            momentum = self._momentum(weight)
            if taken and weight.gradient is not None:
                margins = stepped(weight, self.momentum, self.decay)
                dtype = weight.parameter.dtype
                for found, needed in ((values, weight.values), (momentum, weight.momentum)):
                    for value, other, margin in zip(
                        found or [], needed or [], margins if needed else [], strict=True
                    ):
                        close = near(0.0, 4 * UNIT[dtype] * margin + SMALLEST[dtype])
                        assert close(value, other), (value, other)
            else:
                assert same(values, weight.values)
                assert same(momentum, weight.momentum)
            weight.values, weight.momentum = values, momentum

    def _momentum(self, weight: Weight) -> list[float] | None:
        buffer = self.optimizer.state.get(weight.parameter, {}).get("momentum_buffer")
        return None if buffer is None else buffer.flatten().tolist()

    def _heal(self) -> None:
        """Begin anew where NaN or infinity went into a parameter, which would stay there."""
        for number, weight in enumerate(self.weights):
            if not all(abs(value) < 1e35 for value in [*weight.values, *(weight.momentum or ())]):
                weight.parameter.data.fill_(1.0 + number)
                weight.values = [1.0 + number] * len(weight.values)
                if weight.momentum is not None:
                    self.optimizer.state[weight.parameter]["momentum_buffer"].zero_()
                    weight.momentum = [0.0] * len(weight.momentum)

    # The optimizer's groups and state

    @precondition(lambda self: len(self.weights) < 7)
    @rule(group=some_groups)
    def add_group(self, group):
        self.optimizer.add_param_group(self._group(*group))

    @rule()
    def save_optimizer(self):
        momenta = copy.deepcopy([weight.momentum for weight in self.weights])
        state = copy.deepcopy(self.optimizer.state_dict())
        self.kept = state, momenta, [*self.keys]

    @precondition(lambda self: self.kept is not None and len(self.kept[2]) == len(self.keys))
    @rule(drop=st.booleans())
    def load_optimizer(self, drop):
        state, momenta, _ = copy.deepcopy(self.kept)
        self.keys[:] = [ABSENT if drop else key for key in self.kept[2]]
        for group in state["param_groups"] if drop else ():
            group.pop("max_norm", None)
        warned = self.attached and self.life.lost_keys(self.keys)
        with warns_of_lost_keys(warned):
            self.optimizer.load_state_dict(state)
        for weight, momentum in zip(self.weights, momenta, strict=True):
            weight.momentum = momentum

    @rule(way=st.sampled_from([*COPIERS]), gradients=some_gradients)
    def copy_optimizer(self, way, gradients):
        """Go on with a copy, which is not clipped before it has a clipper of its own."""
        state, model = self.clipper.state_dict(), self.life.saved()
        self.close()
        self.module, self.optimizer = COPIERS[way]((self.module, self.optimizer))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for weight, parameter in zip(self.weights, parameters, strict=True):
            weight.parameter, weight.gradient, parameter.grad = parameter, None, None
        self._give(gradients)
        self._take([], self.optimizer.step)
        options = self.life.options
        self._attach(options, RULES[options.rule]())
        self._load(state, model)

    # The clipper's state

    @rule(through_a_file=st.booleans())
    def save(self, through_a_file):
        state = self.clipper.state_dict()
        assert state["steps"] == self.life.steps
        assert state["counters"] == vars(self.life.counters)
        if through_a_file:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        self.saved = [*self.saved, (state, self.life.saved())][-4:]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 3))
    def load(self, which):
        self._load(*self.saved[which % len(self.saved)])

    def _load(self, state: dict[str, Any], model: dict[str, Any]) -> None:
        warned = self._looks_for_groups(state)
        if self.life.fits(model):
            with warns_of_lost_keys(warned):
                self.clipper.load_state_dict(state)
            self.life.load(model)
        else:
            self._refuses(state, warned=warned)

    @rule(spoil=st.sampled_from([*SPOILED]))
    def load_what_does_not_fit(self, spoil):
        state = copy.deepcopy(self.clipper.state_dict())
        SPOILED[spoil](state)
        self._refuses(state, warned=self._looks_for_groups(state))

    def _looks_for_groups(self, state: dict[str, Any]) -> bool:
        """Label what was added, as a state of other labels asks for; tell what that warns of."""
        own = self.clipper.state_dict()
        if state["rule"] != own["rule"] or state["labels"] == own["labels"]:
            return False
        self.life.relabel(self.keys)
        return self.life.lost_keys(self.keys)

    def _refuses(self, state: Any, *, warned: bool) -> None:
        before = self.clipper.state_dict()
        refused = pytest.raises(StateError, match="[Nn]othing was loaded")
        with warns_of_lost_keys(warned), refused:
            self.clipper.load_state_dict(state)
        after = self.clipper.state_dict()
        assert after["labels"] != before["labels"] or equal(after, before)

    @rule(steps=st.sampled_from([0, 7, 1000]))
    def set_steps(self, steps):
        self.clipper.steps = steps
        self.life.steps, self.life.history = steps, []

    # Its end, and the next one

    @rule()
    def flush(self):
        self.clipper.flush()
        assert len(self.sink.steps) == len(self.life.rows)

    @rule()
    def detach(self):
        self.clipper.detach()
        self.life.attached = False

    @rule()
    def close(self):
        self.clipper.close()
        self.life.attached = False
        if not self.stepping:  # else something has failed
            assert len(self.sink.steps) == len(self.life.rows)

    @rule(fails=st.booleans())
    def leave_a_with_block(self, fails):
        with suppress(KeyError), self.clipper as clipper:
            assert clipper is self.clipper
            if fails:
                raise KeyError
        self.close()

    @precondition(lambda self: not self.attached)
    @rule(options=some_options, reuse=st.booleans())
    def attach(self, options, reuse):
        self.close()
        rule, real = RULES[options.rule](), ABSENT
        if reuse:
            options = options._replace(rule=self.life.options.rule)
            rule, real = self.life.rule, self.real_rule
        self._attach(options, rule, real)

    @rule()
    def refused(self):
        """Ask for what cannot be had; nothing comes of it."""
        for steps in (-1, True, 1.5, None):
            with pytest.raises(ArgumentError, match="steps is .*: give a whole number >= 0"):
                self.clipper.steps = steps
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(AttachError, match="cannot be copied or pickled"):
                copier(self.clipper)
        if not self.attached:
            return
        with pytest.raises(AttachError, match="Another GradientClipper is attached to this"):
            GradientClipper(self.optimizer, 1.0)
        if self.life.rule.fresh is not None:
            other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
            with pytest.raises(ArgumentError, match="learns from the norms of another clipper"):
                GradientClipper(other, self.real_rule)

    # What always holds

    @invariant()
    def everything_is_as_the_model_has_it(self):
        for weight in self.weights:
            assert same(weight.parameter.detach().flatten().tolist(), weight.values)
            assert same(self._momentum(weight), weight.momentum)
            grad = weight.parameter.grad
            assert same(None if grad is None else grad.flatten().tolist(), weight.gradient)
        assert not hasattr(self.optimizer, "found_inf")
        assert bool(self.optimizer._optimizer_step_pre_hooks) == self.attached

    @invariant()
    def the_clipper_says_what_was_done(self):
        clipper, life = self.clipper, self.life
        assert clipper.steps == life.steps
        assert [*clipper.labels] == life.labels
        if self.watched:
            assert clipper.skipped == life.counters.skipped_steps
            assert clipper.clip_rate() == life.counters.clip_rate
        if life.last is None:
            assert clipper.last is None
            return
        count = len(life.last["norm"])
        assert clipper.last.step == life.last["step"]
        for name in ("norm", "clipped_norm", "threshold", "coefficient", "nonfinite"):
            found = getattr(clipper.last, name)
            assert found.shape == (() if count == 1 else (count,))
            assert found.dtype == (torch.bool if name == "nonfinite" else F64)
            values = found.flatten().tolist()
            assert all(map(near(1e-9), values, life.last[name])), (name, values, life.last)

    @invariant()
    def the_sink_has_the_steps_but_for_the_last_batch(self):
        rows, found = self.life.rows, self.sink.steps
        assert 0 <= len(rows) - len(found) < self.life.options.flush_every
        if self.watched:
            assert len(rows) == len(found)
        for row, step in zip(rows, found, strict=False):
            if not row.get("seen"):
                self._compare_row(row, step)
                row["seen"] = True

    def _compare_row(self, row: dict[str, Any], step: Any) -> None:
        for name in ("step", "nonfinite", "skipped", "nonfinite_steps", "skipped_steps"):
            assert getattr(step, name) == row[name], name
        for name in ("norm", "clipped_norm", "threshold", "coefficient", "clip_rate"):
            assert near(1e-9)(getattr(step, name), row[name]), (name, step, row)
        norms = row["parameter_norms"] if self.life.options.per_parameter else None
        assert (step.parameter_norms is None) == (norms is None)
        if norms is not None:
            assert step.parameter_norms.keys() == norms.keys()
            assert all(near(1e-6)(step.parameter_norms[name], norms[name]) for name in norms)
        assert (step.incident is not None) == row["incident"]
        if step.incident is not None:
            assert step.incident.startswith("The norm was ")
            assert f" at step {row['step']}, " in step.incident
            assert (", above " in step.incident) == math.isfinite(row["norm"])
            assert step.incident.endswith(f". The norms before: {row['before']}.")

    def teardown(self):
        if hasattr(self, "clipper"):
            self.close()


def near(relative: float, absolute: float = 1e-100) -> Callable[[Any, Any], bool]:
    """Return what tells whether numbers are near to each other; NaN and None to themselves."""

    def is_near(found: float | None, needed: float | None) -> bool:
        if found is None or needed is None or found == needed:
            return found is needed or found == needed
        if not (math.isfinite(found) and math.isfinite(needed)):
            return math.isnan(found) and math.isnan(needed)
        return abs(found - needed) <= relative * abs(needed) + absolute

    return is_near


def same(found: list[float] | None, needed: list[float] | None) -> bool:
    """Tell whether numbers are equal, NaN to NaN."""
    return repr(found) == repr(needed)


def equal(one: Any, other: Any) -> bool:
    """Tell whether two states are equal."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_any_life_goes_as_the_model_has_it():
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, stateful_step_count=30))


USUAL = [("plain", 1), ("uneven", 2), ("small", 5)]
SPIKE = [("large", 1), ("plain", 2), ("large", 3)]
UNFIT = [("plain", 1), ("nan", 2), ("inf", 0)]


@pytest.mark.parametrize("exceed", ["scale", "skip", "observe"])
@pytest.mark.parametrize("rule", RULES)
def test_one_life_with_every_rule_and_policy(rule, exceed):
    number = [*RULES].index(rule) + len(exceed)
    nonfinite = ["zero", "skip", "raise", "propagate"][number % 4]
    scope = ["global", "parameter", "group"][number % 3]
    bound = [None, 0.75][number // 2 % 2]
    options = Options(rule, scope, 2.0, bound, exceed, nonfinite, None, 3, "all")
    groups = [([((2,), F64), ((3, 2), F64)], ABSENT), ([((2,), F32)], 2.0)]
    groups = groups[: 1 + number % 2]
    machine = Machine()
    machine.begin(groups, options, "model", Searching, 0.5, 0.25, {}, watched=False)
    again, through = machine.step_again, "optimizer"
    for event in (
        lambda: again(USUAL),
        lambda: machine.step(SPIKE, through),
        lambda: machine.step([("zero", 0)], through),
        lambda: machine.step(SPIKE, through),
        lambda: machine.save(through_a_file=False),
        lambda: again(USUAL),
        lambda: machine.step_with_closure([SPIKE, UNFIT, USUAL], through),
        lambda: machine.step(UNFIT, through),
        lambda: machine.step(SPIKE, through),
        lambda: machine.load(0),
        lambda: again(USUAL),
        lambda: machine.set_steps(7),
        lambda: machine.step(UNFIT, through),
        lambda: machine.add_group(([((3,), F64)], ABSENT)),
        lambda: machine.add_group(([((2,), F64)], 1.0)),
        lambda: machine.step(SPIKE, "clipper"),
        lambda: again(USUAL),
        machine.refused,
        *[lambda spoil=spoil: machine.load_what_does_not_fit(spoil) for spoil in SPOILED],
        machine.save_optimizer,
        lambda: machine.load_optimizer(drop=True),
        lambda: machine.load_optimizer(drop=True),
        lambda: machine.load_optimizer(drop=False),
        lambda: machine.step(SPIKE, through),
        machine.detach,
        lambda: machine.step(SPIKE, through),
        lambda: machine.attach(options, reuse=True),
        lambda: again(USUAL),
        lambda: machine.step(SPIKE, through),
        machine.flush,
    ):
        event()
        machine.everything_is_as_the_model_has_it()
        machine.the_clipper_says_what_was_done()
        machine.the_sink_has_the_steps_but_for_the_last_batch()
    machine.teardown()


@pytest.mark.slow
def test_any_of_many_lives_goes_as_the_model_has_it():
    run_state_machine_as_test(Machine, settings=settings(max_examples=200, stateful_step_count=40))


# What a state is for


def sgd(*groups: dict[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer with one parameter a group, with a gradient of norm 5."""
    for group in groups:
        group["params"] = [nn.Parameter(torch.zeros(2))]
        group["params"][0].grad = torch.tensor([3.0, 4.0])
    return torch.optim.SGD([*groups], lr=LR)


def test_a_state_loads_where_the_same_groups_were_added_and_no_step_was_taken():
    def begun() -> tuple[torch.optim.Optimizer, GradientClipper]:
        optimizer = sgd({})
        clipper = GradientClipper(optimizer, thresholds.GrowthLimit(), scope="group")
        optimizer.add_param_group(sgd({}).param_groups[0])
        return optimizer, clipper

    optimizer, clipper = begun()
    optimizer.step()
    _, resumed = begun()
    resumed.load_state_dict(clipper.state_dict())
    assert equal(resumed.state_dict(), clipper.state_dict())


def test_a_state_loads_where_at_first_nothing_was_in_any_norm():
    optimizer = sgd({"max_norm": None})
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.add_param_group(sgd({"max_norm": 2.0}).param_groups[0])
    optimizer.step()
    state = clipper.state_dict()
    clipper.close()
    resumed = GradientClipper(optimizer, 1.0)
    resumed.load_state_dict(state)
    assert resumed.steps == 1


def test_a_state_that_was_saved_after_a_refused_step_loads():
    optimizer = sgd({})
    options = {"scope": "group", "max_value": 1.0}
    clipper = GradientClipper(optimizer, thresholds.GrowthLimit(), **options)
    unfit = nn.Parameter(torch.zeros(1, dtype=torch.complex64))
    unfit.grad = torch.ones_like(unfit)
    optimizer.add_param_group({"params": [unfit]})
    with pytest.raises(GradientError, match="complex elements cannot be bounded"):
        optimizer.step()
    state = clipper.state_dict()
    clipper.close()
    resumed = GradientClipper(optimizer, thresholds.GrowthLimit(), **options)
    resumed.load_state_dict(state)
    assert equal(resumed.state_dict(), state)


def test_a_skip_limit_counts_steps_and_not_evaluations_of_their_closures():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Searching([weight], lr=LR)
    optimizer.evaluations = 2
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip", skip_limit=1)
    values = iter([NAN, 0.25])

    def closure() -> None:
        weight.grad = torch.full((2,), next(values))

    optimizer.step(closure)
    assert clipper.skipped == 0
    assert weight.tolist() == [-0.125, -0.125]


# Closures that decide how often they are evaluated


@settings(max_examples=30)
@given(
    start=st.lists(st.integers(-8, 8), min_size=2, max_size=4),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    limit=st.sampled_from([0.5, 4.0, None]),
    search=st.sampled_from([None, "strong_wolfe"]),
    nonfinite=st.sampled_from(["zero", "raise", "propagate"]),
)
def test_lbfgs_goes_as_with_a_closure_that_clips_itself(start, scale, limit, search, nonfinite):
    def run(attach: bool) -> tuple[list[float], list[float]]:
        weight = nn.Parameter(torch.tensor(start, dtype=F64))
        factors = torch.arange(1, len(start) + 1, dtype=F64) * scale
        optimizer = torch.optim.LBFGS([weight], lr=0.5, max_iter=4, line_search_fn=search)
        if attach:
            GradientClipper(optimizer, limit, nonfinite=nonfinite)
        norms = []

        def closure() -> float:
            weight.grad = 2 * factors * weight.detach()
            norms.append(norm_of(weight.grad.tolist(), 2.0))
            if not attach and limit is not None and norms[-1] > limit:
                weight.grad *= limit / norms[-1]
            return (factors * weight.detach() ** 2).sum().item()

        for _ in range(3):
            optimizer.step(closure)
        return weight.tolist(), norms

    found, needed = run(attach=True), run(attach=False)
    assert len(found[1]) == len(needed[1])
    assert all(map(near(1e-6, 1e-9), found[0], needed[0])), (found, needed)
