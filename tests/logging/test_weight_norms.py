"""The norms of the parameters before a step, and of their changes in it, against copies by hand."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradclip import ArgumentError, AttachError, GradientClipper, MemorySink, SkipLimitError
from tests.support.clippers import OPTIONS, step_by
from tests.support.curves import Kept, indices_in
from tests.support.device import take_the_device_route
from tests.support.reference import norms_and_ratios, parameter_with

INF = math.inf
SHAPES = {"matrix": (3, 4), "brain": (5,), "wide": (2, 2), "number": (), "c": (3,), "empty": (0, 2)}
DTYPES = {"brain": torch.bfloat16, "wide": torch.float64, "c": torch.complex64}


class Watched(nn.Module):
    """Parameters of several shapes and dtypes, two of them frozen or never used."""

    def __init__(self, dtypes: Any = DTYPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            dtype = dtypes.get(name, torch.float32)
            self.register_parameter(name, nn.Parameter(values.to(dtype)))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))

    def set_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for name in SHAPES:
            parameter = getattr(self, name)
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = values.to(parameter.dtype)

    def copies(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}


def check(sink: Any, snapshots: list[dict[str, Tensor]], every: int, order: float = 2.0) -> None:
    """Compare what a sink keeps with copies from before the first step and after each one."""
    assert len(sink.steps) == len(snapshots) - 1
    for step, (before, after) in zip(sink.steps, pairwise(snapshots), strict=True):
        if step.step % every:
            assert (step.weight_norms, step.update_ratios) == (None, None)
            continue
        norms, ratios = norms_and_ratios(before, after, order)
        assert {**step.weight_norms} == pytest.approx(norms, rel=1e-6)
        assert {**step.update_ratios} == pytest.approx(ratios, rel=1e-5, abs=1e-9)


def train_with(
    steps: int, *sinks: Any, max_norm: Any = 1.0, **options: Any
) -> list[dict[str, Tensor]]:
    """Train with sinks; return copies of the parameters before the first step and after each."""
    model = Watched({} if "max_value" in options else DTYPES)  # complex elements have no bound
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    snapshots = [model.copies()]
    with GradientClipper(optimizer, max_norm, model=model, log=sinks, **options):
        for step in range(steps):
            model.set_gradients(step)
            optimizer.step()
            snapshots.append(model.copies())
    return snapshots


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
def test_norms_at_every_third_step(engine, order):
    """Of parameters of every kind that are trained; those that never change have a ratio of 0."""
    sink = MemorySink(weights_every=3)
    check(sink, train_with(7, sink, engine=engine, norm_type=order), 3, order)
    assert {*sink.steps[3].weight_norms} == {*SHAPES, "unused"}
    assert sink.steps[3].update_ratios["unused"] == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """A skipped step changes nothing, so that its ratios are 0."""
    sink = MemorySink(weights_every=2)
    options = {"max_norm": 0.1, **OPTIONS[name]}
    check(sink, train_with(2, sink, **options), 2, options.get("norm_type", 2.0))
    assert ({*sink.steps[0].update_ratios.values()} == {0.0}) == sink.steps[0].skipped


def test_each_sink_at_its_own_steps():
    one, two, none = MemorySink(weights_every=2), Kept(weights_every=3), Kept()
    snapshots = train_with(8, one, two, none)
    check(one, snapshots, 2)
    check(two, snapshots, 3)
    assert {step.weight_norms for step in none.steps} == {None}


def test_steps_that_a_sink_would_leave_out_are_taken():
    sink = MemorySink(every=4, weights_every=3)
    train_with(9, sink)
    assert indices_in(sink) == [0, 3, 4, 6, 8]


def test_parameters_of_zeros_have_no_ratio():
    parameter, sink = (
        parameter_with(torch.tensor([3.0, 4.0]), value=0.0),
        MemorySink(weights_every=1),
    )
    optimizer = torch.optim.SGD([("bias", parameter)], lr=1.0)
    with GradientClipper(optimizer, None, log=sink):
        optimizer.step()
        optimizer.step()
    assert [step.weight_norms for step in sink.steps] == [{"bias": 0.0}, {"bias": 5.0}]
    assert [step.update_ratios for step in sink.steps] == [{}, {"bias": 1.0}]


@pytest.mark.parametrize("call", ["step(closure)", "step(closure=closure)"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_closures(call, kind):
    """The change is that of all evaluations together."""
    model, sink = nn.Linear(3, 2), MemorySink(weights_every=1)
    optimizer = kind(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        return loss

    with GradientClipper(optimizer, None, model=model, log=sink):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step_by(optimizer, call, closure)
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    check(sink, [before, after], 1)


class ScalingAndShifting(torch.optim.SGD):
    """Changes the parameters before and after the step of its parent."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter *= 0.5
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter += 1.0
        return loss


def test_a_step_that_calls_its_parents_step_is_measured_as_a_whole():
    parameter, sink = (
        parameter_with(torch.tensor([3.0, 4.0]), value=2.0),
        MemorySink(weights_every=1),
    )
    optimizer = ScalingAndShifting([("a", parameter)], lr=0.0)
    parameter.grad = None
    with GradientClipper(optimizer, None, log=sink):
        before = {"a": parameter.detach().clone()}
        parameter.grad = torch.ones(2)
        optimizer.param_groups[0]["lr"] = 0.25
        optimizer.step()
    check(sink, [before, {"a": parameter.detach()}], 1)


def test_several_optimizers_share_a_step():
    """Also where the batch of records is complete before the second one has stepped."""
    model, sink = nn.Linear(3, 2), MemorySink(weights_every=2, flush_every=1)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias], lr=0.2)]
    snapshots = []
    with GradientClipper(optimizers, 1.0, model=model, log=sink) as clipper:
        for _ in range(3):
            snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
            clipper.zero_grad()
            model(torch.ones(4, 3)).square().sum().backward()
            clipper.step()
        snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
    check(sink, snapshots, 2)


def test_an_optimizer_that_has_not_stepped_yet_is_left_out():
    model, sink = nn.Linear(3, 2), MemorySink(weights_every=1)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias], lr=0.2)]
    with GradientClipper(optimizers, 1.0, model=model, log=sink) as clipper:
        model(torch.ones(4, 3)).square().sum().backward()
        optimizers[0].step()
        clipper.flush()
        optimizers[1].step()
    assert [{*step.weight_norms} for step in sink.steps] == [{"weight"}]


@pytest.mark.parametrize("dtypes", [[torch.float32] * 2, [torch.float32, torch.float64]])
def test_steps_inside_backward(dtypes):
    """The steps of one backward pass are one step, of which each optimizer has a part."""
    parameters = {
        name: nn.Parameter(torch.ones(3, dtype=d)) for name, d in zip("ab", dtypes, strict=True)
    }
    sink = MemorySink(weights_every=2, per_parameter="all")
    optimizers = [torch.optim.SGD([item], lr=0.1) for item in parameters.items()]
    for optimizer, parameter in zip(optimizers, parameters.values(), strict=True):
        parameter.register_post_accumulate_grad_hook(lambda p, o=optimizer: o.step())
    snapshots = []
    with GradientClipper(optimizers, 0.5, log=sink, scope="parameter"):
        for step in range(3):
            snapshots.append({name: p.detach().clone() for name, p in parameters.items()})
            sum((step + 1) * p.sum().double() for p in parameters.values()).backward()
            for parameter in parameters.values():
                parameter.grad = None
        snapshots.append({name: p.detach().clone() for name, p in parameters.items()})
    check(sink, snapshots, 2)


def scaled_steps(fused: bool, sink: Any) -> list[dict[str, Tensor]]:
    """Take six steps under a GradScaler, of which two overflow; return copies around the others."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([("a", parameter)], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    snapshots = [{"a": parameter.detach().clone()}]
    with GradientClipper(optimizer, 1.0, log=sink):
        for factor in (1.0, INF, 2.0, 3.0, INF, 4.0):
            optimizer.zero_grad()
            scaler.scale((parameter * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if math.isfinite(factor):
                snapshots.append({"a": parameter.detach().clone()})
    return snapshots


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_that_a_grad_scaler_skips_do_not_count(fused, every):
    sink = MemorySink(weights_every=every)
    check(sink, scaled_steps(fused, sink), every)


def test_steps_that_only_the_device_knows_to_be_skipped(monkeypatch):
    """What is due is told by the host's count, in which they are; each row has its own weights."""
    take_the_device_route(monkeypatch)
    snapshots = scaled_steps(True, sink := MemorySink(weights_every=2))
    measured = [step for step in sink.steps if step.weight_norms is not None]
    assert [step.step for step in measured] == [0, 1]
    for step in measured:
        norms, ratios = norms_and_ratios(*snapshots[step.step : step.step + 2])
        assert {**step.weight_norms} == pytest.approx(norms, rel=1e-6)
        assert {**step.update_ratios} == pytest.approx(ratios, rel=1e-5)


def test_micro_batches_and_accumulation_change_no_weights():
    model, sink = nn.Linear(3, 2), MemorySink(weights_every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientClipper(optimizer, 1.0, model=model, log=sink) as clipper:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            with clipper.micro_batch(of=2):
                model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    check(sink, [before, {name: p.detach() for name, p in model.named_parameters()}], 1)


def test_a_resumed_run_goes_on_at_its_steps(training):
    run, first, second = training(), MemorySink(weights_every=3), MemorySink(weights_every=3)
    with GradientClipper(run.optimizer, 1.0, log=first) as clipper:
        run.take(*[1.0] * 4)
        state = clipper.state_dict()
    with GradientClipper(run.optimizer, 1.0, log=second) as clipper:
        clipper.load_state_dict(state)
        run.take(*[1.0] * 4)
    measured = [step.step for step in first.steps + second.steps if step.weight_norms is not None]
    assert measured == [0, 3, 6]


class Failing(torch.optim.SGD):
    """Changes its parameters and raises at the second step."""

    calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        if self.calls == 2:
            self.param_groups[0]["params"][0] += 10.0
            raise RuntimeError("planned")
        return super().step(closure)


def test_a_step_that_raises_is_measured_when_it_is_taken_again():
    parameter, sink = (
        parameter_with(torch.tensor([3.0, 4.0]), value=1.0),
        MemorySink(weights_every=1),
    )
    optimizer, snapshots = Failing([("a", parameter)], lr=0.1), []
    with GradientClipper(optimizer, None, log=sink):
        for call in range(3):
            if call != 1:
                snapshots.append({"a": parameter.detach().clone()})
            if call == 1:
                with pytest.raises(RuntimeError, match="planned"):
                    optimizer.step()
            else:
                optimizer.step()
    needed = [norms_and_ratios(each, {"a": each["a"] - 0.1 * parameter.grad}) for each in snapshots]
    assert [step.weight_norms for step in sink.steps] == [pytest.approx(norm) for norm, _ in needed]
    ratios = [step.update_ratios for step in sink.steps]
    assert ratios == [pytest.approx(ratio, rel=1e-5) for _, ratio in needed]


def test_steps_that_raise_by_policy_have_no_weights(training):
    run, sink = training(), MemorySink(weights_every=1)
    with GradientClipper(run.optimizer, 1.0, log=sink, nonfinite="skip", skip_limit=1) as clipper:
        with pytest.raises(SkipLimitError):
            run.take(math.nan)
        clipper.flush()
    assert [{*step.update_ratios.values()} for step in sink.steps] == [set()]


def test_a_detached_clipper_leaves_no_hooks_and_no_copies(training):
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=MemorySink(weights_every=1))
    hooks = run.optimizer._optimizer_step_pre_hooks, run.optimizer._optimizer_step_post_hooks
    assert [*map(len, hooks)] == [2, 2]
    clipper.detach()
    assert [*map(len, hooks)] == [0, 0]


def test_without_it_there_are_no_further_hooks(training):
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=MemorySink(per_parameter="all")):
        assert len(run.optimizer._optimizer_step_pre_hooks) == 1


def test_parameters_that_cannot_be_measured_are_refused():
    parameter = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
    optimizer = torch.optim.SGD([("eight", parameter)], lr=0.1)
    with pytest.raises(AttachError, match="norm of eight cannot be measured: set weights_every=0"):
        GradientClipper(optimizer, 1.0, log=MemorySink(weights_every=1))
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("every", [-1, 1.5, True, None])
def test_invalid_numbers_of_a_users_sink_are_refused(training, every):
    with pytest.raises(ArgumentError, match="Kept.weights_every is"):
        GradientClipper(training().optimizer, 1.0, log=Kept(weights_every=every))
