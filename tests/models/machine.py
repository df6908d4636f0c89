"""Drives an optimizer with a clipper, and beside them the model of a clipper's life.

The model adopts each norm and threshold that a step has measured once that is near its own, so
that a decision at the threshold is compared exactly.
"""

import copy
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import gradclip
from gradclip import GradClipError, GradientClipper, MemorySink, StateError
from tests.models import events
from tests.models.events import F32, F64, Gradients, Searching
from tests.models.life import ABSENT, LR, SCOPES, Found, Life, Options, Weight, sgd_step
from tests.models.rules import INF, RULES, Rule
from tests.support.reference import bits_in
from tests.support.tolerances import ROUNDOFF

SMALLEST = {F64: 2.0**-1074, F32: 2.0**-149}


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
        groups=st.lists(events.some_groups, min_size=1, max_size=2),
        options=events.some_options,
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
            self.weights.append(Weight(parameter, shown, group, listed(parameter)))
        return {"params": params} if key is ABSENT else {"params": params, "max_norm": key}

    def _attach(self, options: Options, model_rule: Rule) -> None:
        self.sink = MemorySink(flush_every=options.flush_every, per_parameter=options.per_parameter)
        names = ("norm_type", "max_value", "exceed", "nonfinite", "skip_limit")
        self.clipper = GradientClipper(
            self.optimizer,
            model_rule.real,
            scope=SCOPES[options.scope],
            model=self.module if self.naming == "model" else None,
            log=self.sink,
            **{name: getattr(options, name) for name in names},
        )
        self.life = Life(options, model_rule, self.weights, self.keys)

    # Gradients

    def _give(self, gradients: Gradients) -> None:
        for number, weight in enumerate(self.weights):
            kind, shift = gradients[number % len(gradients)]
            parameter, other = weight.parameter, self.weights[number - 1]
            shape, dtype = parameter.shape, parameter.dtype
            alike = (other.parameter.shape, other.parameter.dtype) == (shape, dtype)
            if kind == "none":
                parameter.grad = weight.gradient = None
            elif kind == "shared" and alike:
                parameter.grad, weight.gradient = other.parameter.grad, other.gradient
            elif kind != "keep":
                scale = {**events.SCALES, **events.EXTREMES[dtype]}.get(kind, 1.0)
                first = shift + number
                values = [((3 * i + first) % 7 - 3) * scale for i in range(parameter.numel())]
                if kind in ("nan", "inf", "-inf") and values:
                    values[first % len(values)] = float(kind)
                parameter.grad = torch.tensor(values, dtype=dtype).reshape(shape)
                weight.gradient = listed(parameter.grad)

    @rule(to_none=st.booleans())
    def zero_grad(self, to_none):
        self.clipper.zero_grad(set_to_none=to_none)
        for weight in self.weights:
            if to_none:
                weight.gradient = None
            elif weight.gradient is not None:
                weight.gradient[:] = [0.0] * len(weight.gradient)

    # Steps

    @rule(gradients=events.some_gradients, through=st.sampled_from(["optimizer", "clipper"]))
    def step(self, gradients, through):
        self._give(gradients)
        self._take([], through)

    @rule(gradients=events.some_gradients)
    def step_again(self, gradients):
        """Step often enough for a rule to know what is usual, and for a batch to be full."""
        for shift in range(4):
            self.step([(kind, place + shift) for kind, place in gradients], "optimizer")

    @rule(
        evaluations=st.lists(events.some_gradients, min_size=2, max_size=3),
        through=st.sampled_from(["optimizer", "keyword", "clipper"]),
    )
    def step_with_closure(self, evaluations, through):
        # A limit is for steps; test_life.py has what an evaluation does to it.
        searching = isinstance(self.optimizer, Searching)
        if not searching or self.life.options.skip_limit is not None:
            evaluations = evaluations[-1:]
        self._take(evaluations, through)

    def _take(self, evaluations: list[Gradients], through: str) -> None:
        """Step, with a closure where there are evaluations; compare with the model."""
        life, called = self.life, 0
        found: Found | None = None
        raised: GradClipError | None = None
        if life.attached:
            life.relabel(self.keys)

        def look() -> None:
            nonlocal found
            grads = [weight.parameter.grad for weight in self.weights]
            self.noted = [(grad, None if grad is None else grad._version) for grad in grads]
            found = life.measure() if life.attached else None

        def closure() -> Tensor:
            nonlocal called
            if called and found is not None:
                self._compare_gradients(life.write(life.decide(found)))
            self._give(evaluations[called])
            look()
            called += 1
            return torch.tensor(float(called))

        self.optimizer.evaluations = max(1, len(evaluations))
        stepper = self.clipper if through == "clipper" else self.optimizer
        try:
            if not evaluations:
                look()
                stepper.step()
            else:
                by_name = {"closure": closure} if through == "keyword" else {}
                loss = stepper.step(*[] if by_name else [closure], **by_name)
                assert loss.item() == called == len(evaluations)
        except GradClipError as error:
            raised = error
        if found is not None:
            self._compare_step(found, raised)
        else:
            assert raised is None
            self._compare_gradients(set())
            self._compare_weights(taken=True)
        self._heal()

    def _compare_step(self, found: Found, raised: GradClipError | None) -> None:
        life, last = self.life, self.clipper.last
        norms, limits = last.norms.tolist(), last.thresholds.tolist()
        narrow = any(weight.parameter.dtype is F32 for weight in self.weights)
        assert norms == near(found.norms, 1e-6 if narrow else 1e-12)
        needed = life.thresholds_of(norms)
        for index in found.present - {None}:
            assert not norms[index] < INF or limits[index] == near(needed[index])
        decision = life.decide(found._replace(norms=norms, thresholds=limits))
        assert type(raised) is (decision.error or type(None)), (raised, decision)
        assert last.skipped is decision.skip
        if isinstance(raised, gradclip.NonFiniteGradientError):
            assert f"at step {life.steps}, from " in str(raised)
            self._check_culprits(str(raised))
        self._compare_gradients(life.write(decision))
        life.finish(decision)
        self._compare_weights(taken=not decision.skip)

    def _check_culprits(self, message: str) -> None:
        """Check that every parameter with elements that are not finite is named."""
        for weight in self.life.gradients():
            bad = [not math.isfinite(value) for value in weight.gradient or ()]
            indices = weight.norm_indices()
            if any(b and index is not None for b, index in zip(bad, indices, strict=True)):
                assert f"{weight.name} ({sum(bad)} of {len(bad)} elements)" in message

    def _compare_gradients(self, written: set[int]) -> None:
        """Compare the gradients with the model's; where nothing was to be written, exactly."""
        for weight, (noted, version) in zip(self.weights, self.noted, strict=True):
            grad, values = weight.parameter.grad, listed(weight.parameter.grad)
            assert grad is noted
            if id(weight.gradient) in written:
                accuracy = 4 * ROUNDOFF[grad.dtype], SMALLEST[grad.dtype]
                assert values == near(weight.gradient, *accuracy)
                weight.gradient[:] = values
            else:
                assert same(values, weight.gradient)
                assert grad is None or grad._version == version

    def _compare_weights(self, *, taken: bool) -> None:
        for weight in self.weights:
            values, momentum = listed(weight.parameter), self._momentum(weight)
            if taken and weight.gradient is not None:
                roundoff, smallest = (each[weight.parameter.dtype] for each in (ROUNDOFF, SMALLEST))
                sizes = sgd_step(weight, self.momentum, self.decay)
                for found, needed in ((values, weight.values), (momentum, weight.momentum)):
                    each = zip(found or (), needed or (), sizes if needed else (), strict=True)
                    for value, other, size in each:
                        assert value == near(other, 0.0, 4 * roundoff * size + smallest)
            else:
                assert same((values, momentum), (weight.values, weight.momentum))
            weight.values, weight.momentum = values, momentum

    def _momentum(self, weight: Weight) -> list[float] | None:
        return listed(self.optimizer.state.get(weight.parameter, {}).get("momentum_buffer"))

    def _heal(self) -> None:
        """Begin anew where NaN or infinity went into a parameter, which would stay there."""
        for number, weight in enumerate(self.weights):
            if not all(abs(value) < 1e35 for value in [*weight.values, *(weight.momentum or ())]):
                weight.parameter.data.fill_(1.0 + number)
                weight.values = listed(weight.parameter)
                if weight.momentum is not None:
                    self.optimizer.state[weight.parameter]["momentum_buffer"].zero_()
                    weight.momentum = [0.0] * len(weight.momentum)

    # The optimizer's groups and state

    @precondition(lambda self: len(self.weights) < 7)
    @rule(group=events.some_groups)
    def add_group(self, group):
        self.optimizer.add_param_group(self._group(*group))

    @rule()
    def save_optimizer(self):
        momenta = [weight.momentum for weight in self.weights]
        self.kept = copy.deepcopy((self.optimizer.state_dict(), momenta, self.keys))

    @precondition(lambda self: self.kept is not None and len(self.kept[2]) == len(self.keys))
    @rule(drop=st.booleans())
    def load_optimizer(self, drop):
        state, momenta, keys = copy.deepcopy(self.kept)
        self.keys[:] = [ABSENT if drop else key for key in keys]
        for group in state["param_groups"] if drop else ():
            group.pop("max_norm", None)
        warned = self.life.attached and self.life.lost_keys(self.keys)
        with warns_of_lost_keys(warned):
            self.optimizer.load_state_dict(state)
        for weight, momentum in zip(self.weights, momenta, strict=True):
            weight.momentum = momentum

    @rule(way=st.sampled_from([*events.COPIERS]), gradients=events.some_gradients)
    def copy_optimizer(self, way, gradients):
        """Go on with a copy, which is not clipped before it has a clipper of its own."""
        state, model, options = self.clipper.state_dict(), self.life.saved(), self.life.options
        clipper, self.life.attached = self.clipper, False
        self.module, self.optimizer = events.COPIERS[way]((self.module, self.optimizer))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for weight, parameter in zip(self.weights, parameters, strict=True):
            weight.parameter, weight.gradient, parameter.grad = parameter, None, None
        self.step(gradients, "optimizer")
        self._attach(options, RULES[options.rule]())
        clipper.close()
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

    @rule(spoil=st.sampled_from([*events.SPOILED]))
    def load_what_does_not_fit(self, spoil):
        state = copy.deepcopy(self.clipper.state_dict())
        events.SPOILED[spoil](state)
        self._load(state, None)

    def _load(self, state: dict[str, Any], model: dict[str, Any] | None) -> None:
        """Load a state and the model's, which may not fit; None never does."""
        own, warned = self.clipper.state_dict(), False
        if state["rule"] == own["rule"] and state["labels"] != own["labels"]:
            self.life.relabel(self.keys)  # a state of other labels asks for what was added
            warned = self.life.lost_keys(self.keys)
        fits = model is not None and self.life.fits(model)
        refused = pytest.raises(StateError, match="[Nn]othing was loaded")
        with warns_of_lost_keys(warned), nullcontext() if fits else refused:
            self.clipper.load_state_dict(state)
        if fits:
            self.life.load(model)
        else:
            after = self.clipper.state_dict()
            assert after["labels"] != own["labels"] or bits_in(after) == bits_in(own)

    @rule(steps=st.sampled_from([0, 7, 1000]))
    def set_steps(self, steps):
        self.clipper.steps = self.life.steps = steps

    # Its end, and the next one

    @rule()
    def flush(self):
        self.clipper.flush()
        assert len(self.sink.steps) == len(self.life.rows)

    @rule(how=st.sampled_from(["detach", "close", "with block", "with block that fails"]))
    def end(self, how):
        if how in ("detach", "close"):
            getattr(self.clipper, how)()
        else:
            with suppress(KeyError), self.clipper as clipper:
                assert clipper is self.clipper
                if how.endswith("fails"):
                    raise KeyError
        self.life.attached = False
        assert how == "detach" or len(self.sink.steps) == len(self.life.rows)

    @precondition(lambda self: not self.life.attached)
    @rule(options=events.some_options, reuse=st.booleans())
    def attach(self, options, reuse):
        self.end("close")
        if reuse:
            options = options._replace(rule=self.life.options.rule)
        self._attach(options, self.life.rule if reuse else RULES[options.rule]())

    # What always holds

    @invariant()
    def everything_is_as_the_model_has_it(self):
        for weight in self.weights:
            parameter, needed = weight.parameter, (weight.values, weight.gradient, weight.momentum)
            assert same((listed(parameter), listed(parameter.grad), self._momentum(weight)), needed)
        assert not hasattr(self.optimizer, "found_inf")
        assert bool(self.optimizer._optimizer_step_pre_hooks) == self.life.attached
        assert self.life.attached or not self.optimizer._optimizer_step_post_hooks

    @invariant()
    def the_clipper_says_what_was_done(self):
        clipper, life = self.clipper, self.life
        assert (clipper.steps, [*clipper.labels]) == (life.steps, life.labels)
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
            assert listed(found) == near(life.last[name]), name

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
            assert getattr(step, name) == near(row[name]), name
        norms = row["parameter_norms"] if self.life.options.per_parameter else None
        assert step.parameter_norms == near(norms, 1e-6)

    def teardown(self):
        if hasattr(self, "clipper"):
            self.clipper.close()


def listed(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().flatten().tolist()


def near(needed: Any, relative: float = 1e-9, absolute: float = 1e-100) -> Any:
    """Return what equals numbers that are near to these; NaN and None equal themselves."""
    return (
        None if needed is None else pytest.approx(needed, rel=relative, abs=absolute, nan_ok=True)
    )


def same(found: Any, needed: Any) -> bool:
    """Tell whether numbers are equal, NaN to NaN."""
    return repr(found) == repr(needed)
