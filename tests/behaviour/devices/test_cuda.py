"""What only a CUDA device can show: graphs, streams, scaled losses, sizes.

A test that can run on the CPU does so too, which shows that the test itself is right.
"""

import math

import pytest
import torch
from torch import nn

import gradclip
from tests.support.graphs import WARM_UP, GraphTraining, replay_batches
from tests.support.reference import norm_of

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
on_cuda = pytest.mark.parametrize("device", [CUDA], indirect=True)
on_both = pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)
on_many = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA], indirect=True
)


@pytest.fixture
def device(request) -> str:
    return request.param


def assert_alike(one: GraphTraining, other: GraphTraining, rel: float) -> None:
    """Close both clippers and compare what they logged."""
    one.clipper.close()
    other.clipper.close()
    for step, again in zip(one.sink.steps, other.sink.steps, strict=True):
        assert again.norm == pytest.approx(step.norm, rel=rel, nan_ok=True)
        assert again.clipped_norm == pytest.approx(step.clipped_norm, rel=rel, nan_ok=True)
        assert (again.step, again.skipped) == (step.step, step.skipped)


@on_many
def test_a_device_clips_as_the_cpu_does(device, rule, options):
    given = replay_batches(10)
    here = GraphTraining(rule(), **options).eager(given)
    there = GraphTraining(rule(), device=device, **options).eager(given)
    engines = ("triton",) if device == "cuda" else ("native", "operators")
    assert there.clipper.engine in engines
    assert_alike(here, there, rel=1e-3)


@on_both
def test_gradients_on_two_devices_share_a_norm(device):
    tensors = [torch.ones(3), torch.ones(4, device=device), torch.ones(5, device=device).bfloat16()]
    weights = [*map(nn.Parameter, tensors)]
    for order in (1, -1):
        for weight in weights:
            weight.grad = torch.full_like(weight, 2.0)
        norm = gradclip.clip_grad_norm_(weights[::order], 1.0)
        assert norm.item() == pytest.approx(2 * math.sqrt(12))
        after = norm_of([weight.grad.cpu() for weight in weights])
        assert after == pytest.approx(1.0, rel=2e-3)


@on_both
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss_has_the_norm_of_the_loss(device, fused):
    training = GraphTraining(0.01, device=device, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=100)
    given, norms = [batch.to(device) for batch in replay_batches(6)], []
    given[3] *= math.inf
    for batch in given:
        training.optimizer.zero_grad()
        loss = training.model(batch).square().mean()
        if bool(loss.isfinite()):
            parameters = [*training.model.parameters()]
            norms.append(norm_of(torch.autograd.grad(loss, parameters, retain_graph=True)))
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
    training.clipper.close()
    assert [step.norm for step in training.sink.steps] == pytest.approx(norms, rel=1e-4)
    assert [step.step for step in training.sink.steps] == [*range(5)]
    assert training.clipper.skipped == 0


@on_both
def test_autocast_and_other_defaults_change_nothing(device):
    given = [torch.full((5_000,), 2.0**8, device=device) for _ in range(3)]
    needed = gradclip.get_total_norm(given)
    with torch.autocast(device, dtype=torch.bfloat16), torch.device("cpu"):
        assert torch.equal(gradclip.get_total_norm(given), needed)
    assert needed.item() == pytest.approx(2.0**8 * math.sqrt(15_000), rel=1e-6)


@on_cuda
def test_one_launch_measures_and_one_returns_at_once(device):
    weights = [nn.Parameter(torch.ones(size, device=device)) for size in range(1, 1000, 7)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    gradclip.clip_grad_norm_(weights, 1e9)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradclip.clip_grad_norm_(weights, 1e9)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert names.count("power_sums") == 1
    assert names.count("change") == 1
    assert len(names) < 16


@on_cuda
def test_streams_do_not_disturb_each_other(device):
    streams, norms = [torch.cuda.Stream() for _ in range(4)], [[] for _ in range(4)]
    ones = [torch.ones(size, device=device) for size in (3, 70_001)]
    given = [[tensor * (n + 1) for tensor in ones] for n in range(4)]
    torch.cuda.synchronize()
    for _ in range(50):
        for n, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                norms[n].append(gradclip.get_total_norm(given[n]))
    torch.cuda.synchronize()
    for n, found in enumerate(norms):
        needed = (n + 1) * math.sqrt(70_004)
        assert [norm.item() for norm in found] == pytest.approx([needed] * 50, rel=1e-6)


CAPTURED = ["Fixed", "Percentile", "Quantile", "Auto", "MedianDeviation"]
CAPTURED += ["MovingAverage", "RelativeToWeights"]


@on_cuda
@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"scope": "parameter"}])
@pytest.mark.parametrize("rule", CAPTURED, indirect=True)
def test_a_captured_step_replays_with_right_norms_and_logs(device, rule, options):
    given = replay_batches(12)
    given[7][0, 0] = math.nan if options else given[7][0, 0]
    eager, replayed = (GraphTraining(rule(), device=device, **options) for _ in range(2))
    eager.eager(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        replayed.eager(given[:WARM_UP])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    replayed.optimizer.zero_grad()
    with torch.cuda.graph(graph):
        replayed.step()
    for batch in given[WARM_UP:]:
        replayed.batch.copy_(batch)
        graph.replay()
    assert replayed.clipper.steps == 12
    assert_alike(eager, replayed, rel=1e-5)
    for one, other in zip(eager.model.parameters(), replayed.model.parameters(), strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.slow
@on_cuda
@pytest.mark.parametrize("rows", [1, 5])
def test_more_than_two_to_the_31_elements(device, rows):
    """In one tensor: its norm, those of its rows, scaled and bounded elements."""
    shape = rows, 2**31 // rows + 3
    weight = nn.Parameter(torch.ones(shape, device=device, dtype=torch.bfloat16))
    weight.grad = torch.full(shape, 0.5, device=device, dtype=torch.bfloat16)
    norm = 0.5 * math.sqrt(rows * shape[1])
    assert gradclip.get_total_norm([weight.grad]).item() == pytest.approx(norm)
    assert gradclip.clip_grad_units_([weight], 0.125).item() == pytest.approx(norm)
    assert weight.grad.amax().item() == weight.grad.amin().item() == 0.125
    assert gradclip.clip_grad_norm_([weight], norm / 8).item() == pytest.approx(norm / 4)
    assert weight.grad.amax().item() == weight.grad.amin().item() == 0.0625
    gradclip.clip_grad_value_([weight], 0.03125)
    assert weight.grad.amax().item() == weight.grad.amin().item() == 0.03125


@on_cuda
def test_a_compiled_step_clips_as_an_eager_one(device):
    def step(weights, gradients):
        norm = gradclip.clip_gradients_(gradients, 1.0)
        return norm, [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)]

    weights = [torch.randn(50, 20, device=device), torch.randn(7, device=device)]
    gradients = [torch.randn_like(weight) for weight in weights]
    copies = [gradient.clone() for gradient in gradients]
    needed, found = step(weights, gradients), torch.compile(step, fullgraph=True)(weights, copies)
    assert torch.equal(needed[0], found[0])
    for one, other in zip(needed[1], found[1], strict=True):
        torch.testing.assert_close(one, other)
