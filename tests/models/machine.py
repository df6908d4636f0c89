"""Drives an optimizer with a clipper, and beside them the model of a clipper's life.

The model adopts each norm and threshold that a step has measured once that is near its own, so
that a decision at the threshold is compared exactly.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from torch import Tensor, nn

from gradclip import (
    ArgumentError,
    AttachError,
    GradClipError,
    GradientClipper,
    MemorySink,
    NonFiniteGradientError,
    StateError,
)
from tests.models.life import (
    ABSENT,
    INF,
    LR,
    RULES,
    SCOPES,
    Found,
    Life,
    Options,
    Rule,
    Weight,
    sgd_step,
)
from tests.support.tolerances import ROUNDOFF

F64, F32 = torch.float64, torch.float32
SMALLEST = {F64: 2.0**-1074, F32: 2.0**-149}
ACCURACY = {F64: 1e-12, F32: 1e-6}


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
        names = ("norm_type", "max_value", "exceed", "nonfinite", "skip_limit")
        self.clipper = GradientClipper(
            self.optimizer,
            self.real_rule,
            scope=SCOPES[options.scope],
            model=self.module if self.naming == "model" else None,
            log=self.sink,
            **{name: getattr(options, name) for name in names},
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
        # A limit is for steps; test_life.py has what an evaluation does to it.
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
        own = found._replace(norms=norms, thresholds=self.life.thresholds_of(norms))
        for limit, needed, norm, there in zip(
            limits, own.thresholds, norms, found.present, strict=True
        ):
            if there and norm < INF:
                assert near(1e-9)(limit, needed)
        return own._replace(thresholds=limits)

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
                close = near(4 * ROUNDOFF[grad.dtype], SMALLEST[grad.dtype])
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
                margins = sgd_step(weight, self.momentum, self.decay)
                dtype = weight.parameter.dtype
                for found, needed in ((values, weight.values), (momentum, weight.momentum)):
                    for value, other, margin in zip(
                        found or [], needed or [], margins if needed else [], strict=True
                    ):
                        close = near(0.0, 4 * ROUNDOFF[dtype] * margin + SMALLEST[dtype])
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
        self.life.steps = steps

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
