"""What every threshold keeps to, whatever its rule."""

from __future__ import annotations

import copy
import inspect
import io
import math

import pytest
import torch

from gradclip.errors import ArgumentError, StateError
from gradclip.thresholds import (
    AdaptiveThreshold,
    Fixed,
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    RelativeToWeights,
    Schedule,
    StepContext,
    ZScore,
)

MAKE = {
    "Fixed": lambda **bounds: Fixed(2.0, **bounds),
    "Fixed without limit": lambda **bounds: Fixed(None, **bounds),
    "Schedule": lambda **bounds: Schedule(lambda step: 1.0 + step, **bounds),
    "RelativeToWeights": lambda **bounds: RelativeToWeights(0.5, **bounds),
    "Percentile": lambda **bounds: Percentile(30.0, 8, **bounds),
    "ZScore": lambda **bounds: ZScore(1.0, 0.9, 3, **bounds),
    "MovingAverage": lambda **bounds: MovingAverage(1.05, 0.9, 3, 1e9, **bounds),
    "MeanDeviation": lambda **bounds: MeanDeviation(1.0, 6, 3, **bounds),
    "MedianDeviation": lambda **bounds: MedianDeviation(1.0, 5, 3, **bounds),
    "GrowthLimit": lambda **bounds: GrowthLimit(1.5, **bounds),
}
ADAPTIVE = [name for name, make in MAKE.items() if isinstance(make(), AdaptiveThreshold)]
MEMORY = {  # elements for k labels, as the class docstrings have it
    "Percentile": lambda k: k * (2 * 8 + 1) + k,
    "ZScore": lambda k: 2 * k + k,
    "MovingAverage": lambda k: k + k,
    "MeanDeviation": lambda k: k * 6 + k,
    "MedianDeviation": lambda k: k * 5 + k,
    "GrowthLimit": lambda k: k,
}
STEPS = (torch.rand(60, 3, generator=torch.Generator().manual_seed(1)).double() * 4 + 0.1).tolist()
STEPS[20][0] = STEPS[41][2] = 90.0
STEPS[13][1] = None
STEPS[30] = [math.nan, 1.0, math.inf]

every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
adaptive = pytest.mark.parametrize("make", [MAKE[name] for name in ADAPTIVE], ids=ADAPTIVE)
labels = pytest.mark.parametrize("count", [1, 3])


def steps_of(count, start=0, stop=60):
    return [step[:count] for step in STEPS[start:stop]]


def saved(rule):
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def held(rule):
    """Return every tensor that a rule holds, by name, the derived ones too."""
    found = dict(rule.state) if isinstance(rule, AdaptiveThreshold) else {}
    if isinstance(rule, Percentile):
        found["ordered"] = rule._ordered._bounded
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


@every
@labels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e20, 1e307])
def test_thresholds_are_numbers_from_zero_to_infinity(make, count, dtype, scale, driver):
    run = driver(make(), count, dtype)
    largest = torch.finfo(dtype).max
    for step in steps_of(count, 31, 45):
        norms = [min((norm or 0.0) * scale, largest) for norm in step]
        limits = run.step(norms)
        assert (limits.shape, limits.dtype, limits.device.type) == ((count,), dtype, "cpu")
        assert bool((limits >= 0).all()), limits
    for name, tensor in held(run.rule).items():
        assert bool(tensor.isfinite().all()), name


@every
@labels
def test_norms_that_are_not_finite_make_no_threshold_nan(make, count, driver):
    run = driver(make(), count)
    unusable = [[math.nan] * count, [math.inf] * count]
    for step in [*unusable, *steps_of(count, 0, 9), *unusable]:
        assert bool((run.step(step) >= 0).all())


@every
@labels
def test_later_steps_do_not_change_what_was_returned(make, count, driver):
    run = driver(make(), count)
    returned = [run.step(step) for step in steps_of(count)]
    assert [limits.tolist() for limits in returned] == driver(make(), count).run(steps_of(count))


@adaptive
def test_every_result_is_a_new_tensor(make, driver):
    run = driver(make(), 3)
    held = [run.step(step) for step in steps_of(3)]
    taken = {tensor.untyped_storage().data_ptr() for tensor in run.rule.state.values()}
    assert len({limits.data_ptr() for limits in held}) == len(held)
    assert not taken & {limits.untyped_storage().data_ptr() for limits in held}


@adaptive
@labels
@pytest.mark.parametrize("unusable", [math.nan, math.inf, None])
def test_an_unusable_norm_leaves_the_state_bit_for_bit(make, count, unusable, driver):
    run = driver(make(), count)
    run.run(steps_of(count, 0, 20))
    before = copied(held(run.rule))
    run.step([unusable] * count)
    assert same(held(run.rule), before)
    run.step(STEPS[1][:count])
    assert not same(held(run.rule), before)


@adaptive
@pytest.mark.parametrize("unusable", [math.nan, math.inf, None])
def test_an_unusable_norm_of_one_label_leaves_the_others_alone(make, unusable, driver):
    """Among the others the state moves on as if that label were not there."""
    run, alone = driver(make(), 3), driver(make(), 3)
    run.run(steps_of(3, 0, 12))
    alone.run(steps_of(3, 0, 12))
    before = copied(held(run.rule))
    run.step([STEPS[15][0], unusable, STEPS[15][2]])
    alone.step(STEPS[15])
    for name, tensor in held(run.rule).items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert torch.equal(tensor[::2], held(alone.rule)[name][::2]), name


@adaptive
@labels
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_clipped_norm_that_is_not_finite_leaves_the_state_bit_for_bit(make, count, bad, driver):
    run = driver(make(), count)
    run.run(steps_of(count, 0, 12))
    before, norms = copied(held(run.rule)), run.tensor([2.0] * count)
    run.rule.observe(norms, norms * bad, run.context([2.0] * count))
    assert same(held(run.rule), before)


@every
@labels
@pytest.mark.parametrize("at", [0, 2, 7, 31, 50])
def test_a_resumed_run_decides_bit_for_bit_as_the_one_that_never_stopped(make, count, at, driver):
    whole, first, second = (driver(make(), count) for _ in range(3))
    expected = whole.run(steps_of(count))
    first.run(steps_of(count, 0, at))
    second.run(steps_of(count, 3, 17))  # a state that has to go
    second.step_index = at
    state = saved(first.rule)
    second.rule.load_state_dict(state)
    assert same(held(second.rule), held(first.rule))
    assert second.run(steps_of(count, at)) == expected[at:]
    assert repr(state) == repr(saved(first.rule))  # the run did not write what it was given


@adaptive
def test_a_saved_state_does_not_change_later(make, driver):
    run = driver(make(), 3)
    run.run(steps_of(3, 0, 12))
    state = run.rule.state_dict()
    before = copy.deepcopy(state)
    run.run(steps_of(3, 12, 30))
    assert repr(state) == repr(before)


@every
def test_labels_together_are_bit_for_bit_as_each_alone(make, driver):
    together = driver(make(), 3).run(STEPS)
    for label in range(3):
        alone = driver(make())
        alone.weights = [label + 1]
        limits = alone.run([[step[label]] for step in STEPS])
        found = [[step[label]] for step in together]
        if isinstance(make(), MeanDeviation):  # a sum of numbers is not rounded like that of a row
            for [one], [other] in zip(found, limits, strict=True):
                assert one == pytest.approx(other, rel=1e-12)
        else:
            assert found == limits


@adaptive
def test_added_labels_start_fresh_and_leave_the_others_bit_for_bit(make, driver):
    run, fresh = driver(make(), 2), driver(make(), 1)
    run.run(steps_of(2, 0, 25))
    before = copied(held(run.rule))
    run.rule.start([*run.labels, "new"], torch.device("cpu"), torch.float64)
    for name, tensor in held(run.rule).items():
        assert torch.equal(tensor[:2], before[name]), name
        assert torch.equal(tensor[2:], held(fresh.rule)[name]), name
    fresh.run([[step[2]] for step in steps_of(3, 25)])
    run.run(steps_of(3, 25))
    for name, tensor in held(run.rule).items():
        assert torch.equal(tensor[2:], held(fresh.rule)[name]), name


@adaptive
def test_other_labels_all_start_fresh(make, driver):
    run = driver(make(), 2)
    run.run(steps_of(2))
    run.rule.start(["label 1", "label 0", "new"], torch.device("cpu"), torch.float64)
    assert same(held(run.rule), held(driver(make(), 3).rule))


def wrong_states(state):
    """Yield what went wrong, and the state, for a right one."""
    tensors = [name for name in state if name != "rule"]
    first, last = tensors[0], tensors[-1]
    floating = next(name for name in tensors if state[name].is_floating_point())
    yield "another rule", {**state, "rule": "Other"}
    yield "no rule", {name: state[name] for name in tensors}
    yield "missing key", {name: state[name] for name in state if name != last}
    yield "extra key", {**state, "more": torch.zeros(3)}
    yield "empty", {}
    yield "no mapping", list(state.values())
    yield "None", None
    yield "no tensor", {**state, last: state[last].tolist()}
    yield "wrong shape", {**state, last: state[last][:-1]}
    yield "more labels", {**state, first: torch.cat([state[first], state[first]])}
    yield "bool", {**state, last: state[last] > 0}
    yield "complex", {**state, floating: state[floating] + 0j}
    yield "counts", {**state, floating: state[floating].long()}
    for value in (math.nan, math.inf, -1.0):
        wrong = state[floating].clone()
        wrong.view(-1)[-1] = value
        yield str(value), {**state, floating: wrong}
    if "counts" in state:
        for value in (-1, 2**53):
            yield f"count {value}", {**state, "counts": torch.full_like(state["counts"], value)}
        yield "fractions", {**state, "counts": state["counts"].double()}
        yield "complex counts", {**state, "counts": state["counts"] + 0j}


def refusal(rule, state):
    try:
        rule.load_state_dict(state)
    except StateError as error:
        return str(error)
    return "loaded"


@adaptive
@labels
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(make, count, driver):
    run = driver(make(), count)
    run.run(steps_of(count, 0, 20))
    state, before = saved(run.rule), copied(held(run.rule))
    assert refusal(run.rule, state) == "loaded"
    for wrong, found in wrong_states(state):
        assert "Nothing was loaded" in refusal(run.rule, found), wrong
        assert same(held(run.rule), before), wrong


@pytest.mark.parametrize("name", ["Fixed", "Schedule", "RelativeToWeights"])
def test_a_rule_without_state_saves_nothing_and_refuses_that_of_another(name, driver):
    run = driver(MAKE[name](), 3)
    run.run(steps_of(3, 0, 5))
    assert run.rule.state_dict() == {}
    run.rule.load_state_dict({})
    with pytest.raises(
        StateError,
        match=rf"(?s)^{name} keeps no state, found {{'rule': 'Percentile', .*: load the state into "
        r"a clipper with the threshold it was saved from\. Nothing was loaded\.$",
    ):
        run.rule.load_state_dict(driver(Percentile(), 3).rule.state_dict())


@adaptive
def test_a_state_loads_on_a_device_without_float64_and_back(make, driver):
    whole, narrow = driver(make(), 3), driver(make(), 3, torch.float32)
    whole.run(steps_of(3, 0, 5))
    narrow.rule.load_state_dict(whole.rule.state_dict())
    for name, tensor in held(narrow.rule).items():
        assert bool(tensor.isfinite().all()), name
    limits = narrow.run(steps_of(3, 5, 12))
    assert limits == [pytest.approx(step, rel=1e-5) for step in whole.run(steps_of(3, 5, 12))]
    back = driver(make(), 3)
    back.rule.load_state_dict(narrow.rule.state_dict())
    assert back.run(steps_of(3, 12, 29)) == [
        pytest.approx(step, rel=1e-4) for step in narrow.run(steps_of(3, 12, 29))
    ]


@every
@labels
def test_cap_and_floor_hold_the_threshold(make, count, driver):
    free = driver(make(), count).run(steps_of(count))
    both = {"cap": 2.0, "floor": 0.5}
    for bounds in ({"cap": 1.5}, {"floor": 2.5}, both, {"cap": 0, "floor": 0}):
        low, high = bounds.get("floor", 0.0), bounds.get("cap", math.inf)
        limits = driver(make(**bounds), count).run(steps_of(count))
        assert all(low <= limit <= high for step in limits for limit in step), bounds
        assert limits[0] == [min(max(limit, low), high) for limit in free[0]], bounds


@every
@pytest.mark.parametrize("bound", ["cap", "floor"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1", torch.ones(2)])
def test_a_cap_or_floor_that_cannot_be_meant_is_refused(make, bound, value):
    with pytest.raises(ArgumentError, match=f"^{bound} is .*: give "):
        make(**{bound: value})


@pytest.mark.parametrize("bound", ["cap", "floor"])
def test_the_error_says_what_none_would_mean(bound):
    message = rf"^{bound} is -1: give a finite number >= 0, or None for no {bound}\.$"
    with pytest.raises(ArgumentError, match=message):
        Fixed(1.0, **{bound: -1})


@every
def test_a_floor_above_the_cap_is_refused(make):
    with pytest.raises(ArgumentError, match="floor is 2 and cap is 1.0: give a floor that is not"):
        make(cap=1.0, floor=2)


@every
def test_cap_and_floor_are_keywords(make):
    parameters = inspect.signature(type(make())).parameters
    for name in ("cap", "floor"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is None


@pytest.mark.parametrize("name", ADAPTIVE)
@labels
def test_the_state_has_the_documented_size_and_does_not_grow(name, count, driver):
    run = driver(MAKE[name](), count)
    for _ in range(2):
        assert sum(tensor.numel() for tensor in held(run.rule).values()) == MEMORY[name](count)
        run.run(steps_of(count) + steps_of(count))


@adaptive
@labels
def test_the_state_stays_where_it_is(make, count, driver):
    """As a captured CUDA graph needs it, also after loading."""
    run = driver(make(), count)
    at = {name: tensor.data_ptr() for name, tensor in held(run.rule).items()}
    run.run(steps_of(count))
    run.rule.load_state_dict(saved(run.rule))
    assert {name: tensor.data_ptr() for name, tensor in held(run.rule).items()} == at


@every
@labels
@pytest.mark.parametrize("bounds", [{}, {"cap": 3.0, "floor": 1.0}], ids=["free", "held"])
def test_the_host_reads_nothing_of_another_device(make, count, bounds):
    """Tensors of the device "meta" have no values: reading one raises."""
    rule, meta = make(**bounds), torch.device("meta")
    rule.start([str(index) for index in range(count)], meta, torch.float64)
    norms = torch.ones(count, dtype=torch.float64, device=meta)
    context = StepContext(0, torch.ones(count, dtype=torch.bool, device=meta), 2.0, norms)
    for _ in range(3):
        limits = rule.thresholds(norms, context)
        rule.observe(norms, norms, context)
    assert (limits.device, limits.dtype, limits.shape) == (meta, torch.float64, (count,))


@adaptive
def test_another_default_device_or_dtype_changes_nothing(make, driver):
    expected = driver(make(), 3).run(STEPS)
    torch.set_default_dtype(torch.float16)
    try:
        run = driver(make(), 3)
        with torch.device("meta"):
            run.rule.start(run.labels, torch.device("cpu"), torch.float64)
        assert run.run(STEPS) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@every
def test_a_rule_is_made_without_the_default_device(make):
    with torch.device("hpu"):  # where no tensor can be made
        make()


@every
def test_the_repr_is_the_call_that_makes_the_rule(make):
    for bounds in ({}, {"cap": 3.0}, {"floor": 0.5}, {"cap": 3.0, "floor": 0.5}):
        shown = repr(make(**bounds))
        for name in ("cap", "floor"):
            assert (f"{name}={bounds.get(name)}" in shown) == (name in bounds)
        if "Schedule" not in shown:
            assert repr(eval(shown)) == shown


@pytest.mark.parametrize(
    ("kind", "arguments", "shown"),
    [
        (Fixed, {"max_norm": 1.0}, "Fixed(1.0)"),
        (Fixed, {"max_norm": None}, "Fixed(None)"),
        (Percentile, {}, "Percentile(10.0, window=1000)"),
        (ZScore, {"cap": 1}, "ZScore(2.5, decay=0.97, warmup=25, eps=1e-06, cap=1.0)"),
        (MovingAverage, {}, "MovingAverage(1.05, decay=0.98, warmup=100, warmup_norm=1.0)"),
        (MeanDeviation, {}, "MeanDeviation(6.0, window=128, warmup=64)"),
        (MedianDeviation, {}, "MedianDeviation(10.0, window=100, warmup=50)"),
        (RelativeToWeights, {}, "RelativeToWeights(0.01, eps=0.001)"),
        (GrowthLimit, {"floor": 0.0}, "GrowthLimit(1.01, floor=0.0)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_defaults_are_those_of_the_sources(kind, arguments, shown):
    assert repr(kind(**arguments)) == shown
