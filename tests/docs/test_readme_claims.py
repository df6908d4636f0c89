"""Claims of the README on rules, devices, graphs, logs and the demo that no other test shows."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, MemorySink, cli, thresholds
from tests.support.curves import values_in

ORDINARY = [1.0 + 0.1 * math.sin(step) for step in range(200)]


def fed(rule, norms, **options) -> tuple[GradientClipper, list[float], list[float]]:
    """Take a step with each norm; return the clipper, the thresholds and the clipped norms."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, rule, **options)
    limits, clipped = [], []
    for norm in norms:
        weight.grad = torch.tensor([norm])
        optimizer.step()
        limits.append(clipper.last.threshold.item())
        clipped.append(weight.grad.item())
    return clipper, limits, clipped


def test_of_the_rules_one_by_the_mean_misses_spikes_for_128_steps_after_one():
    for later, skipped in ((1, 1), (128, 1), (129, 2)):
        norms = [*ORDINARY, 100.0, *ORDINARY[: later - 1], 50.0]
        clipper, _, _ = fed(thresholds.MeanDeviation(6), norms, exceed="skip")
        assert clipper.skipped == skipped


def test_of_the_rules_zscore_follows_a_slow_rise():
    rising = [ORDINARY[step % 200] * 1.005**step for step in range(600)]
    assert fed(thresholds.ZScore(2.5), rising)[0].clip_rate() < 0.02
    assert rising[-1] > 15 * rising[0]


def test_of_the_rules_growth_limit_lets_norms_come_back_by_1_percent_a_step():
    _, _, clipped = fed(thresholds.GrowthLimit(1.01), [1.0, 1.0, 0.1, *[1.0] * 50])
    assert clipped[2:] == pytest.approx([0.1 * 1.01**step for step in range(51)], rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "steps"),
    [(thresholds.ZScore, 25), (thresholds.MeanDeviation, 63), (thresholds.MedianDeviation, 49)],
)
def test_in_the_first_steps_there_is_no_threshold_but_a_cap(rule, steps):
    assert fed(rule(), [*ORDINARY[: steps - 1], 1e6])[2][-1] == 1e6
    assert fed(rule(), [*ORDINARY[:steps], 1e6])[2][-1] < 1e6
    assert fed(rule(cap=5.0), [*ORDINARY[: steps - 1], 1e6])[2][-1] == pytest.approx(5.0)


def test_a_percentile_of_norms_that_are_mostly_idle_needs_a_floor():
    norms = [float(step % 5 > 0) for step in range(100)]  # idle in 20 % of the steps
    for rule, threshold in (
        (thresholds.Percentile(10), 0.0),
        (thresholds.Percentile(10, floor=0.5), 0.5),
        (thresholds.Percentile(30), 1.0),
    ):
        assert fed(rule, norms)[2][-4:] == [threshold] * 4


def test_norms_that_rise_at_once_and_for_good_are_skipped_for_good():
    for rule in (thresholds.ZScore, thresholds.MovingAverage):
        begun, _, _ = fed(rule(), ORDINARY, exceed="skip")
        risen, _, _ = fed(rule(), [*ORDINARY, *(10 * norm for norm in ORDINARY)], exceed="skip")
        assert risen.skipped - begun.skipped == len(ORDINARY)


@pytest.mark.usefixtures("like_a_device")
def test_torch_operators_on_a_device_multiply_also_by_1():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.6, 0.8 + 2**-20])
    bits, version = weight.grad.clone(), weight.grad._version
    GradientClipper(torch.optim.SGD([weight], lr=0.0), 5.0).step()
    assert weight.grad._version > version
    assert torch.equal(weight.grad, bits)


def test_an_incident_of_a_graph_names_no_parameter(tape, captured):
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    batch, sink = torch.ones(3, 2), MemorySink()
    clipper = GradientClipper(optimizer, 1.0, model=model, log=sink)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    step()
    step()
    batch.fill_(math.nan)
    step()
    batch.fill_(1.0)
    with captured(), tape:
        step()
    batch.fill_(math.nan)
    tape.replay()
    clipper.close()
    eager, replayed = (step.incident for step in sink.steps if step.incident)
    assert "weight" in eager
    assert "nan at step 4" in replayed
    assert "weight" not in replayed


@pytest.mark.parametrize("through_the_writer", [False, True])
def test_tensorboard_without_its_data_server_follows_one_file(
    tmp_path, training, through_the_writer
):
    run = training()
    writer = SummaryWriter(str(tmp_path))
    log = writer if through_the_writer else tmp_path
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    with GradientClipper(run.optimizer, 1.0, log=log) as clipper:
        for _ in range(2):
            run.take(1.0)
            writer.add_scalar("loss", 1.0)
            clipper.flush()
            writer.flush()
            reader.Reload()
    writer.close()
    assert len(reader.Scalars("loss")) == 2
    assert len(reader.Scalars("grad_norm/pre")) == (2 if through_the_writer else 1)


@pytest.mark.slow
def test_the_explosion_of_the_demo_begins_in_the_recurrent_weights(tmp_path):
    assert cli.main(["demo", "--steps", "100", "--out", str(tmp_path / "demo")]) == 0
    values = values_in(tmp_path / "demo/unclipped")
    norms, prefix = values["grad_norm/pre"], "parameter_norm/"
    # Its first step: later ones, and their heights, depend on the processor, whose roundings grow.
    first = next(step for step, norm in enumerate(norms) if norm > 100)
    begin = {tag.removeprefix(prefix): v[first] for tag, v in values.items() if prefix in tag}
    assert max(begin, key=begin.__getitem__).startswith("recurrent.weight")
    assert begin["head.weight"] < 0.5 * norms[first]
