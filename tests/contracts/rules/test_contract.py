"""What every rule keeps to, whatever its formula."""

import inspect
import io
import math
from types import MappingProxyType

import pytest
import torch

from gradclip import thresholds
from gradclip.errors import ArgumentError, StateError
from gradclip.thresholds import AdaptiveThreshold, Percentile, Threshold, ZScore, is_foreign
from tests.support.rules import ADAPTIVE, RULES, Driver

CPU, META = torch.device("cpu"), torch.device("meta")
MEMORY = {  # elements for each label, as the table of gradclip/thresholds/base.py has it
    "Percentile": 2 * 5 + 1 + 1,
    "Quantile": 1,
    "Auto": 5,
    "ZScore": 2 + 1,
    "MovingAverage": 1 + 1,
    "MeanDeviation": 5 + 1,
    "MedianDeviation": 5 + 1,
    "GrowthLimit": 1,
}
STEPS = (torch.rand(60, 3, generator=torch.Generator().manual_seed(1)).double() * 4 + 0.1).tolist()
STEPS[20][0] = STEPS[41][2] = 90.0
STEPS[13][1] = None
STEPS[30] = [math.nan, 1.0, math.inf]

every = pytest.mark.parametrize("make", RULES.values(), ids=RULES)
adaptive = pytest.mark.parametrize("make", [RULES[name] for name in ADAPTIVE], ids=ADAPTIVE)
labels = pytest.mark.parametrize("count", [1, 3])


def steps_of(count, start=0, stop=60):
    return [step[:count] for step in STEPS[start:stop]]


def saved(rule):
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def tensors_of(rule):
    """Return every tensor that a rule keeps, by name, the derived ones too."""
    tensors = dict(rule.state) if isinstance(rule, AdaptiveThreshold) else {}
    if isinstance(rule, Percentile):
        tensors["ordered"] = rule._ordered._bounded
    return tensors


def copies(rule):
    return {name: tensor.clone() for name, tensor in tensors_of(rule).items()}


def equal_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_shared_limit(rule):
    """Return a rule whose labels do not depend on each other, as those of AdaGC's warm-up do."""
    if isinstance(rule, thresholds.MovingAverage):
        rule.warmup_norm = 1e9
    return rule


def test_the_table_has_every_rule_and_none_is_foreign():
    """A rule that is missing in `gradclip.thresholds.RULES` would be copied and checked."""
    public = {getattr(thresholds, name) for name in thresholds.__all__}
    kinds = {kind for kind in public if inspect.isclass(kind) and issubclass(kind, Threshold)}
    rules = {kind for kind in kinds if not inspect.isabstract(kind)}
    assert {type(make()) for make in RULES.values()} == rules
    assert not any(is_foreign(make()) for make in RULES.values())
    assert is_foreign(type("Own", (thresholds.Fixed,), {})(1.0))


@every
@labels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-300, 1.0, 1e20, 1e307])
def test_thresholds_are_numbers_from_zero_to_infinity(make, count, dtype, scale):
    """Also for norms that are not finite; the state stays finite."""
    run = Driver(make(), count, dtype)
    largest, unusable = torch.finfo(dtype).max, [[math.nan] * count, [math.inf] * count]
    steps = steps_of(count, 31, 45)
    scaled = [[min((norm or 0.0) * scale, largest) for norm in step] for step in steps]
    for step in [*unusable, *scaled, *unusable]:
        limits = run.step(step)
        assert (limits.shape, limits.dtype, limits.device.type) == ((count,), dtype, "cpu")
        assert bool((limits >= 0).all()), limits
    for name, tensor in tensors_of(run.rule).items():
        assert bool(tensor.isfinite().all()), name


@every
@labels
def test_later_steps_do_not_change_what_was_returned(make, count):
    """Records keep the tensors; a rule that learns returns another one at every step."""
    run = Driver(make(), count)
    returned = [run.step(step) for step in steps_of(count)]
    assert [limits.tolist() for limits in returned] == Driver(make(), count).run(steps_of(count))
    if isinstance(run.rule, AdaptiveThreshold):
        taken = {tensor.untyped_storage().data_ptr() for tensor in run.rule.state.values()}
        assert len({limits.data_ptr() for limits in returned}) == len(returned)
        assert not taken & {limits.untyped_storage().data_ptr() for limits in returned}


@every
def test_a_number_and_a_tensor_of_one_norm_are_the_same(make):
    """Up to the order of a sum: a deviation adds numbers in another order than a tensor."""
    runs = [Driver(make(), numbers=numbers) for numbers in (True, False)]
    limits = [run.run(steps_of(1)) for run in runs]
    assert limits[0] == [[pytest.approx(limit, rel=1e-14)] for [limit] in limits[1]]
    for tensors in zip(*(tensors_of(run.rule).values() for run in runs), strict=True):
        torch.testing.assert_close(*tensors, rtol=1e-14, atol=0)


@adaptive
@labels
@pytest.mark.parametrize("unusable", [math.nan, math.inf, None, "clipped NaN", "clipped inf"])
def test_an_unusable_norm_leaves_the_state_bit_for_bit(make, count, unusable):
    """A norm that is not finite, or without a gradient, or not finite after clipping."""
    run = Driver(make(), count)
    run.run(steps_of(count, 0, 20))
    before = copies(run.rule)
    if isinstance(unusable, str):
        norms = run.tensor([2.0] * count)
        factor = float(unusable.removeprefix("clipped "))
        run.rule.observe(norms, norms * factor, run.context([2.0] * count))
    else:
        run.step([unusable] * count)
    assert equal_tensors(tensors_of(run.rule), before)
    run.step(STEPS[1][:count])
    assert not equal_tensors(tensors_of(run.rule), before)


@every
def test_labels_together_are_bit_for_bit_as_each_alone(make):
    """One label takes the way of numbers, several that of tensors."""
    together = Driver(without_shared_limit(make()), 3).run(STEPS)
    for label in range(3):
        alone = Driver(without_shared_limit(make()))
        alone.weights = [label + 1]
        limits = [limit for [limit] in alone.run([[step[label]] for step in STEPS])]
        expected = [step[label] for step in together]
        if isinstance(alone.rule, thresholds.MeanDeviation):  # a sum of numbers rounds otherwise
            expected = pytest.approx(expected, rel=1e-12)
        assert limits == expected


@adaptive
def test_added_labels_start_fresh_and_leave_the_others_bit_for_bit(make):
    """Where the first labels are others, all start fresh."""
    run, fresh = Driver(without_shared_limit(make()), 2), Driver(without_shared_limit(make()), 1)
    run.run(steps_of(2, 0, 25))
    before = copies(run.rule)
    run.rule.start([*run.labels, "new"], CPU, torch.float64)
    for name, tensor in tensors_of(run.rule).items():
        assert torch.equal(tensor[:2], before[name]), name
        assert torch.equal(tensor[2:], tensors_of(fresh.rule)[name]), name
    fresh.run([[step[2]] for step in steps_of(3, 25)])
    run.run(steps_of(3, 25))
    for name, tensor in tensors_of(run.rule).items():
        assert torch.equal(tensor[2:], tensors_of(fresh.rule)[name]), name
    run.rule.start(["label 1", "label 0", "new"], CPU, torch.float64)
    assert equal_tensors(tensors_of(run.rule), tensors_of(Driver(make(), 3).rule))


KEYS = "'counts', 'mean', 'rule', 'variance']"
NOT_DENSE = "'mean' is a {}, not a dense tensor with values"
NUMBERS = "'{}' holds numbers that are negative, not finite or endless counts"
LENGTH = "the number of norms and, where there is one, the size of the window"
WRONG = [  # what is given in place of a state of ZScore, or changed in it, and what the error says
    ([1], "The state of the threshold ZScore is a list, not a dict"),
    (MappingProxyType({}), "The threshold is ZScore and the state is of no rule"),
    ({"rule": None}, "The threshold is ZScore and the state is of None"),
    ({"rule": "Other"}, "The threshold is ZScore and the state is of Other"),
    ({7: 1}, f"The state of ZScore has the keys ['7', {KEYS} and needs [{KEYS}"),
    ({"mean": 1.0}, NOT_DENSE.format("float")),
    ({"mean": torch.zeros(1, device="meta")}, NOT_DENSE.format("Tensor")),
    ({"mean": torch.zeros(1).to_sparse()}, NOT_DENSE.format("Tensor")),
    ({"mean": torch.zeros(2)}, f"'mean' has the shape (2,) and needs (1,), which are {LENGTH}"),
    ({"mean": torch.zeros(1).long()}, "'mean' is of torch.int64 and needs torch.float64"),
    ({"mean": torch.zeros(1) + 0j}, "'mean' is of torch.complex64 and needs torch.float64"),
    ({"counts": torch.zeros(1) + 0j}, "'counts' is of torch.complex64 and needs torch.int64"),
    ({"counts": torch.zeros(1) > 0}, "'counts' is of torch.bool and needs torch.int64"),
    ({"mean": torch.tensor([math.nan])}, NUMBERS.format("mean")),
    ({"mean": torch.tensor([math.inf])}, NUMBERS.format("mean")),
    ({"variance": torch.tensor([-1.0])}, NUMBERS.format("variance")),
    ({"counts": torch.tensor([-1])}, NUMBERS.format("counts")),
    ({"counts": torch.tensor([2**53])}, NUMBERS.format("counts")),
]
REMEDY = "load the state into a clipper with the {}threshold it was saved from. Nothing was loaded."


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_the_error_says_what_is_wrong_in_a_state(wrong, said):
    """What was found, what is needed, and the remedy; nothing is loaded before all is checked."""
    run = Driver(ZScore())
    run.run(steps_of(1, 0, 20))
    before = copies(run.rule)
    other = {**Driver(ZScore()).rule.state_dict(), **wrong} if isinstance(wrong, dict) else wrong
    with pytest.raises(StateError) as refused:
        run.rule.load_state_dict(other)
    found = f"ZScore's {said}" if said.startswith("'") else said
    assert str(refused.value) == f"{found}: {REMEDY.format('labels and the ')}"
    assert equal_tensors(tensors_of(run.rule), before)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ADAPTIVE])
def test_a_rule_without_state_saves_nothing_and_refuses_that_of_another(name):
    """The error shows the beginning of what was found."""
    rule = RULES[name]()
    rule.load_state_dict(rule.state_dict())
    for state in (Driver(Percentile(), 3).rule.state_dict(), None, 7):
        with pytest.raises(StateError) as refused:
            rule.load_state_dict(state)
        found = f"{type(rule).__name__} keeps no state, found {repr(state)[:200]}"
        assert str(refused.value) == f"{found}: {REMEDY.format('')}"
    assert rule.state_dict() == {}


@adaptive
def test_a_state_loads_on_a_device_without_float64_and_back(make):
    """Free slots of a window are free there too, and norms beyond its range are its largest."""
    whole, narrow = Driver(make(), 3), Driver(make(), 3, torch.float32)
    whole.run(steps_of(3, 0, 4))
    narrow.rule.load_state_dict(whole.rule.state_dict())
    for name, tensor in tensors_of(narrow.rule).items():
        assert bool(tensor.isfinite().all()), name
    limits = narrow.run(steps_of(3, 5, 12))
    assert limits == [pytest.approx(step, rel=1e-5) for step in whole.run(steps_of(3, 5, 12))]
    back = Driver(make(), 3)
    back.rule.load_state_dict(narrow.rule.state_dict())
    assert back.run(steps_of(3, 12, 29)) == [
        pytest.approx(step, rel=1e-4) for step in narrow.run(steps_of(3, 12, 29))
    ]
    state = whole.rule.state_dict()
    [floating] = [name for name in state if name != "rule" and name != "counts"][:1]
    narrow.rule.load_state_dict({**state, floating: torch.full_like(state[floating], 1e300)})
    assert bool((narrow.rule.state[floating] == torch.finfo(torch.float32).max).all())
    for signed in whole.rule.signed:
        narrow.rule.load_state_dict({**state, signed: torch.full_like(state[signed], -1e300)})
        assert bool((narrow.rule.state[signed] == torch.finfo(torch.float32).min).all())


@every
@labels
def test_cap_and_floor_hold_the_threshold(make, count):
    """From the first step, and as keywords alone."""
    free = Driver(make(), count).run(steps_of(count))
    both = {"cap": 2.0, "floor": 0.5}
    for bounds in ({"cap": 1.5}, {"floor": 2.5}, both, {"cap": 0, "floor": 0}):
        low, high = bounds.get("floor", 0.0), bounds.get("cap", math.inf)
        limits = Driver(make(**bounds), count).run(steps_of(count))
        assert all(low <= limit <= high for step in limits for limit in step), bounds
        assert limits[0] == [min(max(limit, low), high) for limit in free[0]], bounds
    for name in ("cap", "floor"):
        parameter = inspect.signature(type(make())).parameters[name]
        assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, None)


@every
@pytest.mark.parametrize("bound", ["cap", "floor"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True, "1", torch.ones(2)])
def test_an_invalid_cap_or_floor_is_refused(make, bound, value):
    """Also a floor above the cap."""
    with pytest.raises(ArgumentError, match=f"^{bound} is .*: give "):
        make(**{bound: value})
    with pytest.raises(ArgumentError, match="floor is 2 and cap is 1.0: give a floor that is not"):
        make(cap=1.0, floor=2)


@pytest.mark.parametrize("name", ADAPTIVE)
@labels
def test_the_state_has_the_documented_size_and_stays_where_it_is(name, count):
    """As a captured CUDA graph needs it, also after loading."""
    run = Driver(RULES[name](), count)
    dtypes = {key: tensor.dtype for key, tensor in run.rule.state.items()}
    assert dtypes == {key: torch.int64 if key == "counts" else torch.float64 for key in dtypes}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors_of(run.rule).items()}
    for _ in range(2):
        sizes = [tensor.numel() for tensor in tensors_of(run.rule).values()]
        assert sum(sizes) == MEMORY.get(name, sum(sizes) // count) * count
        state = run.rule.state_dict()
        before = repr(state)
        run.run(steps_of(count))
        assert repr(state) == before  # what was saved stays as it is
        run.rule.load_state_dict(saved(run.rule))
    assert {name: t.data_ptr() for name, t in tensors_of(run.rule).items()} == addresses


@every
@labels
@pytest.mark.parametrize("bounds", [{}, {"cap": 3.0, "floor": 1.0}], ids=["free", "bounded"])
def test_the_host_reads_nothing_of_another_device(make, count, bounds):
    """Tensors of the device "meta" have no values: reading one raises."""
    rule = make(**bounds)
    rule.start([str(index) for index in range(count)], META, torch.float64)
    norms = torch.ones(count, dtype=torch.float64, device=META)
    context = thresholds.StepContext(0, norms > 0, 2.0, norms)
    for _ in range(3):
        limits = rule.thresholds(norms, context)
        rule.observe(norms, norms, context)
    assert (limits.device, limits.dtype, limits.shape) == (META, torch.float64, (count,))


@every
def test_another_default_device_or_dtype_changes_nothing(make):
    """A rule can be made where no tensor can be, and its state is where the norms are."""
    expected = Driver(make(), 3).run(STEPS)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("hpu"):
            rule = make()
        run = Driver(rule, 3)
        with META:
            rule.start(run.labels, CPU, torch.float64)
        assert run.run(STEPS) == expected
    finally:
        torch.set_default_dtype(torch.float32)
