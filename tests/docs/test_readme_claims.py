"""Claims of README and docs on devices, graphs, logs and the demo that no other test shows."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, MemorySink, cli
from tests.support.curves import values_in


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
