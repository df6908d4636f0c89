"""A rank that is lost while it trains: the others hear of it, and take no step."""

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed, nn

from gradclip import GradientClipper
from tests.support.dtensors import spread
from tests.support.processes import Pool

TIMEOUT = 6.0
TRAINING: list[Any] = []
"""The weight, optimizer and clipper of this process."""


def take_two_steps() -> int:
    """Take two steps, and compute the gradient of the third."""
    from torch.distributed.device_mesh import DeviceMesh

    group = distributed.new_group(timeout=timedelta(seconds=TIMEOUT))
    weight = nn.Parameter(spread(torch.zeros(4), DeviceMesh.from_group(group, "cpu"), "0"))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    clipper = GradientClipper(optimizer, 0.01, scope="parameter")
    TRAINING[:] = weight, optimizer, clipper
    for step in range(3):
        optimizer.zero_grad()
        weight.to_local().sum().backward()
        if step < 2:
            optimizer.step()
    return clipper.steps


def take_the_third() -> Any:
    """Return how long the error took, whether nothing has changed, and the steps counted."""
    weight, optimizer, clipper = TRAINING

    def kept() -> list[Any]:
        tensors = [weight.data, weight.grad, optimizer.state[weight]["momentum_buffer"]]
        return [tensor.to_local().tolist() for tensor in tensors]

    before, begun = kept(), time.monotonic()
    with pytest.raises(RuntimeError):
        optimizer.step()
    return time.monotonic() - begun, kept() == before, clipper.steps


@pytest.fixture
def own_ranks() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    for process in pool.processes:
        process.kill()  # one that is stopped does not end by itself
    pool.close()


@pytest.mark.parametrize("sent", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_step_without_a_rank(own_ranks, sent):
    """It raises in time and changes nothing; one that is stopped is connected until the timeout."""
    assert own_ranks.run(take_two_steps) == [2, 2]
    os.kill(own_ranks.processes[1].pid, signal.Signals[sent])
    if sent == "SIGKILL":
        own_ranks.processes[1].join()
    [(took, same, steps)] = own_ranks.run(take_the_third, ranks=[0])
    assert took < TIMEOUT + 2
    assert same
    assert steps == 2
