"""Claims of README and docs on devices, graphs and logs that no other test shows."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper
from tests.support.graphs import GraphTraining, replay_batches


@pytest.mark.usefixtures("like_a_device")
def test_torch_operators_on_a_device_multiply_also_by_1():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([0.6, 0.8 + 2**-20])
    bits, version = weight.grad.clone(), weight.grad._version
    GradientClipper(torch.optim.SGD([weight], lr=0.0), 5.0).step()
    assert weight.grad._version > version
    assert torch.equal(weight.grad, bits)


def test_an_incident_of_a_graph_names_no_parameter(tape, captured):
    given = replay_batches(5)
    for batch in given[2::2]:
        batch.fill_(math.nan)
    training = GraphTraining(1.0).replayed(given, tape, captured)
    eager, replayed = filter(None, training.field("incident"))
    assert "parameter 0" in eager
    assert "nan at step 4" in replayed
    assert "parameter" not in replayed


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
