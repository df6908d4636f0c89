"""Optimizers that step inside backward, against the same ones that step after it."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from gradclip import AttachError, GradientClipper, MemorySink, Threshold
from gradclip.thresholds import MovingAverage, Percentile
from tests.support.reference import INF, bits_in
from tests.support.rules import RULES
from tests.support.twins import PlannedError, assert_tensors_close

LIMIT = 0.5


def three_layers(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return three layers, of which the last one is used now and then."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Linear(3, 3)]
    return nn.Sequential(*layers).to(dtype)


def loss_at(net: Any, step: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    generator = torch.Generator().manual_seed(step)
    found = net[:3](torch.randn(8, 4, generator=generator, dtype=dtype))
    found = net[3](found) if step % 3 else found
    return found.square().mean() * (0.1, 20.0, 3.0, 500.0)[step % 4]


def sgd_of(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def fused_of(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, fused=True)


class Released:
    """A training with an optimizer for each parameter, or for each layer.

    Args:
        inside: True to step inside backward, as soon as the gradients of an optimizer are there.
        by_layer: True for an optimizer for each layer.
    """

    def __init__(
        self,
        max_norm: Any = LIMIT,
        *,
        inside: bool = True,
        by_layer: bool = False,
        kind: Callable[[Any], Optimizer] = sgd_of,
        **options: Any,
    ) -> None:
        self.net, self.sink = three_layers(options.pop("dtype", torch.float64)), MemorySink()
        self.stepping = True
        layers = [layer for layer in self.net if [*layer.parameters()]]
        parts = [[*layer.parameters()] for layer in layers]
        parts = parts if by_layer else [[p] for part in parts for p in part]
        self.optimizers = [kind(part) for part in parts]
        options = {"scope": "parameter", "log": self.sink, **options}
        self.clipper = GradientClipper(self.optimizers, max_norm, model=self.net, **options)
        for part, optimizer in zip(parts, self.optimizers, strict=True):
            for parameter in part if inside else ():
                parameter.register_post_accumulate_grad_hook(self._hook(part, optimizer))
        self.inside = inside

    def _hook(self, part: list[nn.Parameter], optimizer: Optimizer) -> Callable[[Any], None]:
        def step(_: Any) -> None:
            if self.stepping and all(parameter.grad is not None for parameter in part):
                optimizer.step()
                optimizer.zero_grad()

        return step

    def take(self, steps: range) -> None:
        for step in steps:
            loss_at(self.net, step).backward()
            if not self.inside:
                self.clipper.step()
                self.clipper.zero_grad()

    def outcome(self) -> Any:
        """Return all that is the same for steps inside backward and after it."""
        self.clipper.flush()
        rows = [[*row[2:4], *row[5:11]] for row in self.sink.steps]  # without times and None
        last = self.clipper.last
        record = [last.step, last.norms, last.thresholds, last.coefficients]
        state = self.clipper.state_dict()
        learned = [v for v in state["threshold"].values() if isinstance(v, Tensor)]
        return record, [*self.net.parameters()], learned, state["counters"], rows


def check_as_after(**options: Any) -> Released:
    """Train inside backward and after it, with equal results; return the former."""
    max_norm = options.pop("max_norm", lambda: LIMIT)
    inside, after = (Released(max_norm(), inside=each, **options) for each in (True, False))
    for run in (inside, after):
        run.take(range(9))
    (record, weights, learned, counters, rows), needed = inside.outcome(), after.outcome()
    present = record[1] > 0
    assert record[0] == needed[0][0]
    for found, expected in zip(record[1:], needed[0][1:], strict=True):
        torch.testing.assert_close(found[present], expected[present], rtol=1e-9, atol=0)
    assert_tensors_close([weights, learned], [*needed[1:3]], 1e-9)
    assert counters == needed[3]
    for row, expected in zip(rows, needed[4], strict=True):
        assert row == pytest.approx(expected, rel=1e-9)
    return inside


SCOPES = {
    "parameter": {},
    "unit": {"scope": "unit"},
    "group": {"scope": "group", "by_layer": True},
    "a function": {"scope": lambda name, _: name.split(".")[0], "by_layer": True},
    "fused": {"kind": fused_of},
    "infinity norm": {"norm_type": INF},
    "bounded": {"max_value": 0.05},
    "observe": {"exceed": "observe"},
}


@pytest.mark.parametrize("options", SCOPES.values(), ids=SCOPES)
def test_trainings_are_those_of_steps_after_backward(route, options):
    """With one record and one row in the logs for each backward pass."""
    run = check_as_after(**options)
    assert run.clipper.steps == 9
    assert 0 < run.clipper.clip_rate() < 1
    assert len(run.sink.steps) == 9


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@pytest.mark.parametrize("name", RULES)
def test_rules_learn_once_from_each_backward_pass(name, scope):
    """Of MovingAverage, that has no total norm within a pass, without a limit in its warm-up."""
    options = {"warmup_norm": 1e9} if name == "MovingAverage" else {}
    check_as_after(max_norm=lambda: RULES[name](**options), scope=scope)


def test_a_function_is_called_at_each_step_of_a_pass():
    """And once more for the record."""
    asked: list[int] = []

    def limit(step: int) -> float:
        asked.append(step)
        return LIMIT

    run = Released(limit)
    run.take(range(1, 3))
    calls = len(run.optimizers) + 1
    assert asked == [0] * calls + [1] * calls


def test_a_moving_average_limits_each_norm_in_its_warm_up():
    """And not the total norm, which no step within a pass knows."""
    run = Released(MovingAverage(1.05, warmup_norm=0.1))
    run.take(range(1, 2))
    norms = run.clipper.last.norms
    assert (norms > 0.1).sum() > 1
    torch.testing.assert_close(run.clipper.last.clipped_norm, norms.clamp(max=0.1))


def test_groups_with_a_threshold_of_their_own():
    """Need no other gradient, whatever the scope of the others is."""
    run = Released(by_layer=True)
    run.clipper.detach()
    for limit, optimizer in zip((0.1, 0.2, None), run.optimizers, strict=True):
        optimizer.param_groups[0]["max_norm"] = limit
    run.clipper = GradientClipper(run.optimizers, 1.0)
    run.take(range(1, 2))
    assert run.clipper.last.thresholds.tolist() == [0.1, 0.2]
    assert run.clipper.last.clipped_norm.tolist() == pytest.approx([0.1, 0.2])


def test_parameter_norms_are_logged():
    run = Released(log=(sink := MemorySink(per_parameter="all")))
    run.take(range(2))
    run.clipper.flush()
    first, second = (dict(step.parameter_norms) for step in sink.steps)
    names = [name for name, _ in run.net.named_parameters()]
    assert {*first} == {*names[:4]}
    assert {*second} == {*names}
    assert [second[name] for name in names] == pytest.approx(run.clipper.last.norms.tolist())


def test_parameter_norms_of_two_dtypes_are_logged():
    """An optimizer that steps once with all of its gradients is a step of one part."""
    half, full = (nn.Parameter(torch.ones(1, dtype=d)) for d in (torch.bfloat16, torch.float32))
    optimizer, sink = SGD([("half", half), ("full", full)], lr=0.1), MemorySink(per_parameter="all")

    def step_with_both(_: Tensor) -> None:
        if half.grad is not None and full.grad is not None:
            optimizer.step()

    for parameter in (half, full):
        parameter.register_post_accumulate_grad_hook(step_with_both)
    with GradientClipper(optimizer, 1.0, scope="parameter", log=sink):
        (2 * half.float() + 3 * full).backward()
    assert [step.parameter_norms for step in sink.steps] == [{"full": 3.0, "half": 2.0}]


class TenthOfLoss(Threshold):
    needs_loss = True

    def thresholds(self, norms, context):
        return torch.full_like(norms, context.loss / 10)


def test_the_loss_that_was_given_before(route):
    """Is that of the pass: rules see it, and its record has it."""
    run = Released(TenthOfLoss())
    for step in (1, 2):
        loss = run.clipper.loss = loss_at(run.net, step)
        loss.backward()
        assert run.clipper.last.loss.item() == pytest.approx(loss.item())
        limits = run.clipper.last.thresholds
        torch.testing.assert_close(limits, (loss.detach() / 10).expand(6))
        assert run.clipper.loss is None


@pytest.mark.parametrize("nonfinite", ["zero", "propagate"])
def test_norms_that_are_not_finite(nonfinite):
    run = Released(nonfinite=nonfinite)
    run.net[0].bias.register_hook(lambda gradient: gradient * math.nan)
    run.take(range(1, 2))
    assert run.net[0].bias.isfinite().all() == (nonfinite == "zero")
    assert run.net[0].weight.isfinite().all()
    run.clipper.flush()
    assert run.sink.steps[0].nonfinite
    assert "from 0.bias (6 of 6" in run.sink.steps[0].incident


# Passes


def test_accumulated_gradients_are_clipped_at_the_last_pass():
    run, by_hand = Released(), three_layers()
    for step in (1, 2, 4):
        run.stepping = step == 4
        loss_at(run.net, step).backward()
        loss_at(by_hand, step).backward()
    needed = [p.grad.norm().item() for p in by_hand.parameters()]
    assert run.clipper.last.norms.tolist() == pytest.approx(needed)
    assert run.clipper.steps == 1


def test_two_passes_over_one_graph_are_two_steps():
    run = Released()
    loss = run.net[3](torch.ones(2, 3, dtype=torch.float64)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert run.clipper.steps == 2
    assert run.clipper.last.norms.count_nonzero() == 2


def test_a_parameter_without_a_gradient_is_not_learned_from():
    """As an expert that is idle for a while."""
    run = Released(Percentile(50, window=9))
    for step in (0, 3, 6, 9):
        loss_at(run.net, step).backward()
    counts = run.clipper.state_dict()["threshold"]["counts"]
    assert counts.tolist() == [4, 4, 4, 4, 0, 0]


def fail_there(_: Tensor) -> None:
    raise PlannedError


def test_a_pass_that_raises_is_recorded_at_the_next_one():
    """With the norms of the steps that were taken before."""
    run = Released()
    handle = run.net[0].weight.register_hook(fail_there)
    with pytest.raises(PlannedError):
        loss_at(run.net, 1).backward()
    handle.remove()
    assert run.clipper.steps == 0
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    loss_at(run.net, 2).backward()
    assert run.clipper.steps == 2
    run.clipper.flush()
    assert [step.step for step in run.sink.steps] == [0, 1]
    assert run.clipper.last.norms.count_nonzero() == 6


def test_a_rule_that_raises_at_the_first_step_leaves_no_record():
    limits = iter([PlannedError, *[0.5] * 20])

    def limit(_: int) -> float:
        if (found := next(limits)) is PlannedError:
            raise PlannedError
        return found

    run = Released(limit)
    with pytest.raises(PlannedError):
        run.take(range(1, 2))
    run.clipper.flush()
    assert run.clipper.steps == 0
    run.take(range(1, 2))
    assert run.clipper.steps == 1


@pytest.mark.parametrize("end", ["flush", "detach"])
def test_a_pass_that_raises_is_recorded_at_the_end(end):
    run = Released()
    run.net[0].weight.register_hook(fail_there)
    with pytest.raises(PlannedError):
        loss_at(run.net, 1).backward()
    getattr(run.clipper, end)()
    assert run.clipper.steps == 1
    assert 0 < run.clipper.last.norms.count_nonzero() < 6


def test_an_optimizer_may_step_twice_in_a_pass():
    """Each of the steps is recorded, none is mixed with the other."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, 1.0, scope="parameter")

    def step_twice(_: Any) -> None:
        optimizer.step()
        optimizer.step()

    weight.register_post_accumulate_grad_hook(step_twice)
    (weight * 5).sum().backward()
    assert clipper.steps == 2
    assert clipper.last.norm.item() == pytest.approx(1.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    """A reentrant checkpoint has a backward pass, and a record, of its own."""
    run, after = Released(), Released(inside=False)
    for each in (run, after):
        inputs = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        found = checkpoint(each.net[:2], inputs, use_reentrant=reentrant)
        (each.net[2](found) * 9).square().sum().backward()
    after.clipper.step()
    assert_tensors_close([*run.net.parameters()], [*after.net.parameters()], 1e-9)
    assert run.clipper.steps == (2 if reentrant else 1)


# Gradients that are complete


class TrainsWithin(torch.autograd.Function):
    """Takes an optimizer's step in its backward, with gradients that are complete there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Callable[[], None]) -> Tensor:
        ctx.step = step
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.step()
        return gradient, None


@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("how", ["function", "checkpoint"])
def test_an_optimizer_that_is_trained_within_a_backward_is_clipped(how, scope):
    """Its parameters are none of the running pass."""
    inner = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD(inner, lr=1.0)
    clipper = GradientClipper(optimizer, 1.0, scope=scope)

    def step() -> None:
        with torch.enable_grad():
            optimizer.zero_grad()
            sum((p * torch.tensor([3.0, 4.0])).sum() for p in inner).backward()
        optimizer.step()

    calls: list[None] = []

    def train_inside(x: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 2:  # computed again for the backward pass
            step()
        return (x * 2).sin()

    outer = torch.ones(2, requires_grad=True)
    if how == "function":
        TrainsWithin.apply(outer, step).sum().backward()
    else:
        checkpoint(train_inside, outer, use_reentrant=True).sum().backward()
    norm = 1.0 if scope == "parameter" else 0.5**0.5
    assert [p.grad.norm().item() for p in inner] == pytest.approx([norm, norm])
    assert clipper.steps == 1


# Refusals

GLOBAL = r"the other gradients of the norm '.*' are not there yet.* scope='parameter', 'unit', or"
REFUSED = {
    "one norm over all": ({"scope": "global"}, GLOBAL),
    "one norm over all, by layer": ({"scope": "global", "by_layer": True}, GLOBAL),
    "a norm of two optimizers": ({"scope": lambda name, _: name[:1]}, GLOBAL),
    "skip": ({"nonfinite": "skip"}, "the whole step can no longer be skipped"),
    "skip what exceeds": ({"exceed": "skip"}, "the whole step can no longer be skipped"),
    "raise": ({"nonfinite": "raise"}, "the whole step can no longer be skipped"),
    "grad_scaler": ({"grad_scaler": torch.amp.GradScaler("cpu")}, "under a GradScaler"),
}


@pytest.mark.parametrize(("options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_needs_the_whole_step_is_refused(options, text):
    """At the first of the steps: nothing was changed before."""
    run = Released(**options)
    before = bits_in([*run.net.parameters()])
    with pytest.raises(AttachError, match=rf"(?s)SGD steps inside backward\(\).*{text}"):
        run.take(range(1, 2))
    assert bits_in([*run.net.parameters()]) == before
    assert run.clipper.steps == 0


def test_one_optimizer_for_all_is_refused_as_well():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = SGD(weights, lr=1.0)
    clipper = GradientClipper(optimizer, 1.0)
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(AttachError, match=GLOBAL):
        (weights[0] * weights[1]).sum().backward()
    assert clipper.steps == 0


def test_a_group_whose_gradients_come_one_by_one_is_refused():
    weights = {name: nn.Parameter(torch.ones(2)) for name in "ab"}
    optimizer = SGD([*weights.items()], lr=1.0)
    GradientClipper(optimizer, 1.0, scope="group")
    for weight in weights.values():
        weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(AttachError, match="the gradient of [ab] is not there yet, which shares"):
        (weights["a"] * weights["b"]).sum().backward()
    assert [w.tolist() for w in weights.values()] == [[1.0, 1.0]] * 2


def test_a_group_with_a_parameter_that_has_no_part_in_the_pass():
    """Is whole all the same."""
    weights = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = SGD(weights, lr=1.0)
    clipper = GradientClipper(optimizer, 1.0, scope="group")
    weights[0].register_post_accumulate_grad_hook(lambda _: optimizer.step())
    (weights[0] * 7).sum().backward()
    assert clipper.last.norm.item() == pytest.approx(7 * 2**0.5)
    assert weights[0].grad.norm().item() == pytest.approx(1.0)


def test_a_scaler_that_steps_within_is_refused():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=1.0)
    GradientClipper(optimizer, 1.0, scope="parameter")
    weight.register_post_accumulate_grad_hook(lambda _: scaler.step(optimizer))
    with pytest.raises(AttachError, match="under a GradScaler, which may find an overflow"):
        scaler.scale((weight * 7).sum()).backward()
    assert weight.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("where", ["captured", "micro_batch"])
def test_a_step_in_a_captured_graph_or_a_micro_batch_is_refused(captured, where):
    run = Released()
    block = captured() if where == "captured" else run.clipper.micro_batch(of=2)
    text = "a CUDA graph is captured" if where == "captured" else "steps inside micro_batch"
    loss = loss_at(run.net, 1)
    with pytest.raises(AttachError, match=text), block, nullcontext():
        loss.backward()
    assert run.clipper.steps == 0
