"""Micro-batches that are clipped by themselves, against clipping each by hand."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradclip
from gradclip import (
    ArgumentError,
    AttachError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    NonFiniteGradientError,
    Scope,
    TensorBoardSink,
    Threshold,
)
from gradclip.thresholds import MeanDeviation, Percentile
from tests.support.curves import lines_in, steps_in
from tests.support.dtensors import SCOPES, SHAPES, oracle
from tests.support.reference import INF, bits_in, norm_of
from tests.support.twins import PlannedError

LIMIT = 2.0
Gradients = dict[str, Tensor]


def random_gradients(
    seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    return {
        name: (torch.randn(shape, **options) * scale).to(dtype) for name, shape in SHAPES.items()
    }


class Accumulation:
    """Parameters whose micro-batches have the gradients that they are told to have."""

    def __init__(self, max_norm: Any = LIMIT, kind: Any = torch.optim.SGD, **options: Any) -> None:
        self.dtype = options.pop("dtype", torch.float64)
        self.named = {n: nn.Parameter(torch.ones(s, dtype=self.dtype)) for n, s in SHAPES.items()}
        self.optimizer = kind([*self.named.items()], lr=0.1)
        self.clipper = GradientClipper(self.optimizer, max_norm, **options)

    def backward(self, gradients: Gradients, factor: Any = 1.0) -> None:
        if gradients:
            (sum((self.named[n] * g).sum() for n, g in gradients.items()) * factor).backward()

    def take(self, micro_batches: Sequence[Gradients], factor: Any = 1.0) -> None:
        for gradients in micro_batches:
            with self.clipper.micro_batch(of=len(micro_batches)):
                self.backward(gradients, factor)

    @property
    def sums(self) -> Gradients:
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}


def clipped_sums(
    micro_batches: Sequence[Gradients], scope: str, order: float, limit: float, bound: float = INF
) -> Gradients:
    """Return the sums of micro-batches that are each bounded and clipped, in float64."""
    count, sums = len(micro_batches), {name: torch.zeros(1) for name in SHAPES}
    for gradients in micro_batches:
        bounded = {n: g.double().clamp(-bound / count, bound / count) for n, g in gradients.items()}
        clipped = oracle(bounded, scope, order, limit / count)[1]
        sums = {name: total + clipped[name] for name, total in sums.items()}
    return sums


def unequal(one: Gradients, other: Gradients) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in SHAPES)


@settings(max_examples=25)
@given(
    scales=st.lists(st.sampled_from([1e-3, 0.1, 1.0, 30.0, 1e6]), min_size=1, max_size=5),
    scope=st.sampled_from(SCOPES),
    order=st.sampled_from([2.0, 1.0, INF]),
    bound=st.sampled_from([INF, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_sums_are_those_of_clipped_micro_batches(scales, scope, order, bound, dtype):
    """The step then finds the sum within the threshold."""
    micro_batches = [random_gradients(seed, scale, dtype) for seed, scale in enumerate(scales)]
    options = {"scope": scope, "norm_type": order, "max_value": None if bound == INF else bound}
    run = Accumulation(dtype=dtype, **options)
    run.take(micro_batches)
    needed = clipped_sums(micro_batches, scope, order, LIMIT, bound)
    near = {"rtol": 1e-12, "atol": 0} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-7}
    for name, gradient in run.sums.items():
        torch.testing.assert_close(gradient.double(), needed[name], **near)
    run.optimizer.step()
    assert run.clipper.last.norms.max() <= LIMIT * (1 + 1e-6)
    assert run.clipper.last.coefficients.min() >= 1 - 1e-6
    as_they_are = [clipped_sums([each], scope, order, INF) for each in micro_batches]
    clipped = [
        clipped_sums([each], scope, order, LIMIT / len(scales), bound / len(scales))
        for each in micro_batches
    ]
    assert run.clipper.micro_batches == (len(scales), sum(map(unequal, as_they_are, clipped)), 0)


def test_a_step_writes_no_sum_that_is_within_the_threshold():
    run = Accumulation()
    run.take([random_gradients(seed, 30.0) for seed in range(4)])
    versions = [gradient._version for gradient in run.sums.values()]
    before = bits_in(run.sums)
    run.optimizer.step()
    assert bits_in(run.sums) == before
    assert [gradient._version for gradient in run.sums.values()] == versions
    assert run.clipper.clip_rate() == 0.0


def test_groups_and_excluded_parameters():
    """A group's own threshold is divided too; what is never clipped is added as it is."""
    weights = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(4)]
    keys = [{}, {"max_norm": 0.5}, {"max_norm": None}, {}]
    names = ["usual", "own", "never", "excluded"]
    pairs = zip(names, weights, strict=True)
    groups = [{"params": [pair], **key} for pair, key in zip(pairs, keys, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    clipper = GradientClipper(optimizer, 1.0, scope=Scope("global", exclude="excluded"))
    for _ in range(2):
        with clipper.micro_batch(of=2):
            sum((weight * torch.tensor([3.0, 4.0])).sum() for weight in weights).backward()
    assert [weight.grad.norm().item() for weight in weights] == pytest.approx([1, 0.5, 10, 10])


class Asked(Threshold):
    """A rule with a threshold of half the norm, which notes all that it is asked and told."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        self.learned: list[tuple[int, float, float]] = []

    def thresholds(self, norms, context):
        self.asked.append((context.step, norms.item()))
        return norms / 2

    def observe(self, norms, clipped_norms, context):
        self.learned.append((context.step, norms.item(), clipped_norms.item()))


@pytest.mark.parametrize("call", ["step()", "step(closure)"])
def test_rules_learn_from_steps_alone(call):
    """Of a micro-batch they are asked for the threshold of a step with many like it."""
    run = Accumulation(rule := Asked())
    micro_batches = [random_gradients(seed) for seed in range(3)]
    norms = [norm_of(gradients.values()) for gradients in micro_batches]
    for step in range(2):
        rule.asked, rule.learned = [], []
        run.optimizer.zero_grad()
        if call == "step()":
            run.take(micro_batches)
            run.optimizer.step()
        else:
            run.optimizer.step(lambda: run.take(micro_batches))
        norm = run.clipper.last.norm.item()
        needed = [(step, 3 * each) for each in norms] + [(step, norm)]
        assert rule.asked == [(index, pytest.approx(value)) for index, value in needed]
        assert rule.learned == [(step, norm, pytest.approx(norm / 2))]
    assert run.clipper.micro_batches == (6, 6, 0)


class ByLoss(Threshold):
    needs_loss = True

    def thresholds(self, norms, context):
        return torch.full_like(norms, context.loss)


def test_rules_see_the_loss_that_was_given_last():
    run = Accumulation(ByLoss())
    for loss in (0.5, 1.5):
        with run.clipper.micro_batch(of=1):
            run.backward(random_gradients(0, 30.0))
            run.clipper.loss = loss
    assert norm_of(run.sums.values()) == pytest.approx(2.0)


def test_a_micro_batch_without_a_loss_is_refused():
    """The error says where to give it; the gradients are those from before."""
    run = Accumulation(MeanDeviation(6, loss=True), exceed="skip")
    needed = r"there is none: assign clipper.loss = loss within the block .* \(not divided by"
    with pytest.raises(ArgumentError, match=needed), run.clipper.micro_batch(of=2):
        run.backward(random_gradients(0))
    assert not run.sums


def test_the_loss_of_a_micro_batch_is_compared_with_those_of_steps():
    """Undivided, and not learned."""
    run = Accumulation(MeanDeviation(6, 8, loss=True), exceed="skip")
    for step in range(8):
        run.clipper.loss = 2.0 + step % 3 / 10
        run.backward(random_gradients(step))
        run.optimizer.step()
        run.optimizer.zero_grad()
    state = run.clipper.state_dict()
    for loss in (2.1, 9.0):
        with run.clipper.micro_batch(of=2):
            run.backward(random_gradients(0), 0.5)
            run.clipper.loss = loss
    assert norm_of(run.sums.values()) == norm_of(g * 0.5 for g in random_gradients(0).values())
    assert bits_in(run.clipper.state_dict()["threshold"]) == bits_in(state["threshold"])


def test_a_learned_threshold_is_that_of_the_moment():
    run, limit = Accumulation(Percentile(50, window=100), scope="parameter"), {}
    for step in range(5):
        run.backward(random_gradients(step))
        run.optimizer.step()
        run.optimizer.zero_grad()
    state = run.clipper.state_dict()
    spike = random_gradients(9, 50.0)
    run.take([random_gradients(8, 1e-9), spike])
    assert bits_in(run.clipper.state_dict()["threshold"]) == bits_in(state["threshold"])
    # The current norm is the largest of six, whose median is the mean of the two in the middle.
    past = [{n: norm_of([g]) for n, g in random_gradients(step).items()} for step in range(5)]
    for name in SHAPES:
        norms = sorted(each[name] for each in past)
        limit[name] = (norms[2] + norms[3]) / 2
        assert norm_of([run.sums[name]]) == pytest.approx(limit[name] / 2, rel=1e-6)


# Policies

CALM = [random_gradients(seed, 0.01) for seed in range(3)]
WILD = random_gradients(7, 100.0)
BROKEN = {**random_gradients(8, 0.01)}
BROKEN["matrix"] = BROKEN["matrix"].index_fill(0, torch.tensor([0]), math.nan)


def sum_of(*micro_batches: Gradients) -> Gradients:
    return {name: sum(each[name] for each in micro_batches) for name in SHAPES}


ERASED = {**BROKEN, "matrix": torch.zeros(7, 6)}
POLICIES = {
    "zero": ({}, BROKEN, CALM),
    "zero, by parameter": ({"scope": "parameter"}, BROKEN, [*CALM, ERASED]),
    "skip": ({"nonfinite": "skip"}, BROKEN, CALM),
    "propagate": ({"nonfinite": "propagate"}, BROKEN, [*CALM, BROKEN]),
    "observe": ({"exceed": "observe"}, BROKEN, [*CALM, BROKEN]),
    "skip what exceeds": ({"exceed": "skip"}, WILD, CALM),
    "skip what exceeds, bounded": ({"exceed": "skip", "max_value": 90.0}, WILD, CALM),
    "observe what exceeds": ({"exceed": "observe"}, WILD, [*CALM, WILD]),
}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(("options", "odd", "summands"), POLICIES.values(), ids=POLICIES)
def test_policies(route, options, odd, summands, place):
    """One odd micro-batch, at any place, leaves the calm ones as they are."""
    run = Accumulation(**options)
    run.take([*CALM[:place], odd, *CALM[place:]])
    needed = sum_of(*summands)
    for name, gradient in run.sums.items():
        torch.testing.assert_close(gradient, needed[name].double(), equal_nan=True)
    assert run.clipper.micro_batches == (4, odd is WILD, odd is BROKEN)


@pytest.mark.parametrize("options", [{"exceed": "skip"}, {"nonfinite": "skip"}])
def test_what_is_skipped_is_skipped_in_no_norm_either(route, options):
    """A micro-batch is left out as a whole, with the gradients that are never clipped."""
    run = Accumulation(scope=Scope("global", exclude="vector"), **options)
    odd = WILD if "exceed" in options else BROKEN
    for gradients in (CALM[0], odd):
        with run.clipper.micro_batch(of=2):
            run.backward(gradients)
    torch.testing.assert_close(run.sums, CALM[0])


def test_raise_names_the_parameters_and_leaves_the_gradients(route):
    run = Accumulation(nonfinite="raise")
    run.take(CALM)
    before = {name: (gradient, bits_in(gradient)) for name, gradient in run.sums.items()}
    text = r"micro-batch's gradients is nan before step 0, from these parameters: matrix \(6 of 42"
    with pytest.raises(NonFiniteGradientError, match=text):
        run.take([BROKEN])
    assert all(run.sums[name] is gradient for name, (gradient, _) in before.items())
    assert bits_in(run.sums) == {name: bits for name, (_, bits) in before.items()}
    run.optimizer.step()
    assert run.clipper.micro_batches == (4, 0, 1)


# Errors


@pytest.mark.parametrize("error", [PlannedError, KeyboardInterrupt])
def test_an_error_within_leaves_the_gradients_from_before(error):
    """Whatever was computed until then; the next micro-batch is clipped as ever."""
    run = Accumulation()
    run.take(CALM[:1])
    before, bits = run.sums, bits_in(run.sums)

    def fail_after_backward() -> None:
        with run.clipper.micro_batch(of=2):
            run.backward(WILD)
            raise error

    with pytest.raises(error):
        fail_after_backward()
    assert all(run.sums[name] is gradient for name, gradient in before.items())
    assert bits_in(run.sums) == bits
    assert run.clipper.micro_batches.taken == 1
    run.take([WILD])
    assert run.clipper.micro_batches == (2, 1, 0)


def enter_twice(run: Accumulation) -> None:
    with run.clipper.micro_batch(of=2):
        run.take(CALM)


def step_within(run: Accumulation) -> None:
    with run.clipper.micro_batch(of=2):
        run.backward(WILD)
        run.optimizer.step()


def enter_detached(run: Accumulation) -> None:
    run.clipper.detach()
    run.take(CALM)


MISUSES = {
    "within another one": (enter_twice, "micro_batch.. was entered within another one"),
    "a step within": (step_within, "An optimizer steps inside micro_batch"),
    "detached": (enter_detached, "The clipper is detached: attach a new one"),
}


def test_a_skip_limit_counts_no_micro_batches(route):
    """That are left out; it counts steps that are skipped."""
    run = Accumulation(exceed="skip", skip_limit=1)
    run.take([WILD, *CALM, WILD])
    run.clipper.step()
    run.clipper.flush()
    assert (run.clipper.steps, run.clipper.skipped) == (1, 0)


@pytest.mark.parametrize(("misuse", "text"), MISUSES.values(), ids=MISUSES)
def test_misuses_are_refused(misuse, text):
    """The gradients and the parameters are as before."""
    run = Accumulation()
    run.backward(CALM[0])
    before = bits_in([run.sums, run.named])
    with pytest.raises(AttachError, match=text):
        misuse(run)
    assert bits_in([run.sums, run.named]) == before
    assert run.clipper.steps == 0


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", None])
def test_numbers_of_micro_batches_are_checked(count):
    with pytest.raises(ArgumentError, match=r"of is .*: give a whole number >= 1"):
        Accumulation().clipper.micro_batch(of=count)


def test_a_captured_graph_is_refused(captured):
    run = Accumulation()
    with captured(), pytest.raises(AttachError, match="while a CUDA graph is captured"):
        run.take(CALM)


def test_a_block_without_a_backward_pass_gets_a_warning():
    run = Accumulation()
    loss = sum((p * CALM[0][name]).sum() for name, p in run.named.items())
    with pytest.warns(UserWarning, match="No gradient was computed within") as caught:
        run.take([{}])
    assert [warning.filename for warning in caught] == [__file__]
    loss.backward()
    assert bits_in(run.sums) == bits_in(CALM[0])


# GradScaler


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_scaled_micro_batches_are_clipped_as_unscaled_ones(fused, route):
    """By a power of two, to the bit; an overflow of one is left for the scaler."""

    def kind(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, fused=fused)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    run, plain = Accumulation(kind=kind, grad_scaler=scaler), Accumulation(kind=kind)
    for step in range(6):
        micro_batches = [random_gradients(3 * step + i, 40.0 if i == 1 else 0.1) for i in range(3)]
        overflow = step == 3
        run.take(micro_batches[:2], scaler.scale(torch.tensor(1.0)))
        run.take(micro_batches[2:], scaler.scale(torch.tensor(INF if overflow else 1.0)))
        if not overflow:
            plain.take(micro_batches[:2])
            plain.take(micro_batches[2:])
            plain.optimizer.step()
        scaler.step(run.optimizer)
        scaler.update()
        for each in (run, plain):
            each.optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**11
    torch.testing.assert_close(run.named, plain.named, rtol=1e-12, atol=0)
    assert run.clipper.steps == 5
    assert run.clipper.micro_batches == (18, 6, 1)


SCALERS = {
    "not given": (False, "give it to the clipper as grad_scaler="),
    "unscaled before": (True, "unscale when all micro-batches are accumulated"),
}


@pytest.mark.parametrize(("known", "text"), SCALERS.values(), ids=SCALERS)
def test_gradients_of_an_unknown_scale_are_refused(known, text):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = Accumulation(grad_scaler=scaler if known else None)
    run.take(CALM[:1], scaler.scale(torch.tensor(1.0)))
    if known:
        scaler.unscale_(run.optimizer)
    with pytest.raises(AttachError, match=text):
        run.take(CALM[1:]) if known else scaler.step(run.optimizer)
    assert bits_in(run.named) == bits_in(Accumulation().named)


@pytest.mark.parametrize("given", [True, False])
def test_a_disabled_scaler_scales_nothing(given):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Accumulation(grad_scaler=scaler if given else None)
    run.take([WILD], scaler.scale(torch.tensor(1.0)))
    scaler.step(run.optimizer)
    assert run.clipper.last.norm.item() == pytest.approx(LIMIT)


# Gradients of every kind


def test_several_optimizers_share_the_norm_of_a_micro_batch():
    run = Accumulation()
    run.clipper.detach()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in run.named.values()]
    run.clipper = GradientClipper(optimizers, LIMIT)
    micro_batches = [WILD, *CALM]
    run.take(micro_batches)
    torch.testing.assert_close(run.sums, clipped_sums(micro_batches, "global", 2.0, LIMIT))
    run.clipper.step()
    assert run.clipper.last.coefficient == 1
    assert run.clipper.micro_batches == (4, 1, 0)
    assert run.clipper.steps == 1


def test_gradients_of_a_micro_batch_that_is_left_out(route):
    """Are None as before; they are 0 where only the device knows of it."""
    run = Accumulation(exceed="skip")
    run.take([WILD])
    zeros = {name: torch.zeros(shape, dtype=run.dtype) for name, shape in SHAPES.items()}
    torch.testing.assert_close(run.sums, zeros if route == "device" else {})


def test_parameters_without_a_gradient_now_and_then():
    """None stays None until the first gradient; a gradient of before stays as it is."""
    run = Accumulation()
    names = [*SHAPES]
    parts = [{n: WILD[n] for n in names[:2]}, {n: CALM[0][n] for n in names[1:3]}]
    run.take(parts)
    assert [*run.sums] == names[:3]
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    needed = clipped_sums([{**zeros, **part} for part in parts], "global", 2.0, LIMIT)
    torch.testing.assert_close(run.sums, {name: needed[name] for name in names[:3]})


@pytest.mark.parametrize("kinds", ["ss", "sd", "ds", "dsd"])
def test_sparse_and_dense_gradients(kinds):
    """Accumulate as autograd does, in either order."""
    table = nn.Parameter(torch.ones(5, 2, dtype=torch.float64))
    clipper = GradientClipper(torch.optim.SGD([table], lr=0.1), 1.0)
    needed = torch.zeros(5, 2, dtype=torch.float64)
    for kind in kinds:
        with clipper.micro_batch(of=len(kinds)):
            rows = torch.tensor([1, 1, 3])
            nn.functional.embedding(rows, table, sparse=kind == "s").sum().mul(7.0).backward()
        needed.index_add_(0, rows, torch.full((3, 2), 7.0, dtype=torch.float64))
    needed *= 1.0 / needed.norm()
    torch.testing.assert_close(table.grad.to_dense(), needed)


def test_gradients_in_one_memory_are_not_added_to_each_other():
    """Autograd leaves two leaves with one gradient in memory, and doubles it by itself."""
    ours = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    clipper = GradientClipper(torch.optim.SGD(ours, lr=0.1), 100.0, scope="parameter")
    for factor in (1.0, 2.0, 3.0):
        with clipper.micro_batch(of=3):
            (torch.stack(ours).sum(0) * factor).sum().backward()
    assert [p.grad.tolist() for p in ours] == [[6.0] * 3] * 2


def test_backward_passes_that_retain_their_graph():
    run = Accumulation()
    loss = sum((p * CALM[0][name]).sum() for name, p in run.named.items())
    for _ in range(2):
        with run.clipper.micro_batch(of=2):
            loss.backward(retain_graph=True)
    torch.testing.assert_close(run.sums, sum_of(CALM[0], CALM[0]))


# Counts and logs

RATE, BROKEN_ONES = "micro_batch_clip_rate", "nonfinite_micro_batches"
ROUNDS = [[*CALM], [WILD, *CALM], [BROKEN, WILD]]
RATES, NONFINITE = [0.0, 1 / 7, 2 / 9], [0, 0, 1]


def logged_rounds(sink: Any, **options: Any) -> GradientClipper:
    """Take a step without micro-batches and three with some."""
    run = Accumulation(log=sink, **options)
    run.backward(CALM[0])
    for micro_batches in [[], *ROUNDS]:
        run.take(micro_batches)
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.clipper.close()
    return run.clipper


def test_every_sink_has_the_rate_from_the_first_micro_batch_on(tmp_path, route):
    calls: list[dict[str, float]] = []
    memory = MemorySink()
    log = [
        memory,
        JsonlSink(tmp_path / "run.jsonl"),
        TensorBoardSink(tmp_path / "board"),
        CallableSink(lambda numbers, step: calls.append(numbers)),
    ]
    clipper = logged_rounds(log)
    assert clipper.micro_batches == (9, 2, 1)
    for name, column in ((RATE, RATES), (BROKEN_ONES, NONFINITE)):
        assert [getattr(step, name) for step in memory.steps] == [None, *column]
        assert [line.get(name) for line in lines_in(tmp_path / "run.jsonl")] == [None, *column]
        tag = f"grad_norm/{name}"
        assert [numbers.get(tag) for numbers in calls] == [None, *column]
        [file] = (tmp_path / "board").iterdir()
        assert steps_in(file)[tag] == [1, 2, 3]


def test_counts_go_on_from_a_state():
    """A state from before there were micro-batches loads, and a malformed one does not."""
    states = [Accumulation().clipper.state_dict(), logged_rounds(MemorySink()).state_dict()]
    assert "micro_batches" not in states[0]
    for state, taken in zip(states, (0, 9), strict=True):
        run = Accumulation(log=(sink := MemorySink()))
        run.clipper.load_state_dict(state)
        assert run.clipper.micro_batches.taken == taken
        run.take(CALM)
        assert run.clipper.micro_batches.taken == taken + 3
        run.optimizer.step()
        run.clipper.flush()
        assert getattr(sink.steps[-1], RATE) == pytest.approx((2 if taken else 0) / (taken + 3))
    states[1]["micro_batches"]["taken"] = -1
    with pytest.raises(gradclip.StateError, match="taken is -1"):
        Accumulation().clipper.load_state_dict(states[1])
