"""A rank that is lost while it trains: the others hear of it, and take no step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn

from gradclip import GradientClipper

TIMEOUT = 6.0
STARTING = 60.0


def kept(net: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    """Return what a step would change here: parameters, gradients and momentum."""
    tensors = [[p.data, p.grad, optimizer.state[p]["momentum_buffer"]] for p in net.parameters()]
    return [tensor.to_local().clone() for three in tensors for tensor in three]


def train(end: Connection, rank: int, store: str) -> None:
    """Take two steps, then wait for word before the third, and tell what it did."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = distributed.new_group(timeout=timedelta(seconds=TIMEOUT))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    clipper = GradientClipper(optimizer, 0.01, scope="parameter")
    for step in range(3):
        optimizer.zero_grad()
        net(torch.randn(4, 4)).square().mean().backward()
        if step < 2:
            optimizer.step()
    end.send(clipper.steps)
    end.recv()
    before, begun, error = kept(net, optimizer), time.monotonic(), None
    try:
        optimizer.step()
    except Exception as caught:  # noqa: BLE001  # the test looks at what it is
        error = caught
    took = time.monotonic() - begun
    same = all(map(torch.equal, kept(net, optimizer), before))
    end.send((isinstance(error, RuntimeError), repr(error), took, same, clipper.steps))
    end.recv()


class Pair:
    """Two ranks that have taken two steps and have the gradients of the third."""

    def __init__(self, folder: Path) -> None:
        context = get_context("spawn")
        self.ends, self.processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, str(folder / "store"))
            process = context.Process(target=train, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)
        for end in self.ends:
            assert end.poll(STARTING)
            assert end.recv() == 2

    def step_of_first(self) -> Any:
        self.ends[0].send("step")
        assert self.ends[0].poll(2 * TIMEOUT), "it hangs"
        return self.ends[0].recv()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
            process.close()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(tmp_path)
    yield pair
    pair.close()


@pytest.mark.parametrize("sent", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_step_without_a_rank_raises_in_time_and_changes_nothing(pair, sent):
    """One that is stopped is still connected: only the timeout of the group tells."""
    os.kill(pair.processes[1].pid, signal.Signals[sent])
    if sent == "SIGKILL":
        pair.processes[1].join()
    is_runtime_error, error, took, same, steps = pair.step_of_first()
    assert is_runtime_error, error
    assert took < TIMEOUT + 2
    assert same
    assert steps == 2
