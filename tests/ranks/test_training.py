"""Training of wrapped modules on several ranks, against one process with the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks
from gradclip.thresholds import Percentile, RelativeToWeights
from tests.support.dtensors import Recorded, mesh_of, quick

RULES = {
    "fixed": {},
    "each parameter": {"scope": "parameter", "max_norm": 0.01},
    "each unit": {"scope": "unit", "max_norm": 0.005},
    "largest element": {"norm_type": math.inf, "max_norm": 0.01},
    "skipped": {"nonfinite": "skip"},
    "erased": {"nonfinite": "zero"},
    "percentile": {"max_norm": lambda: Percentile(50), "scope": "unit"},
    "weights": {"max_norm": lambda: RelativeToWeights(0.01), "scope": "unit"},
}
COLLECTIVES = {"fsdp2": 1, "ddp": 0, "zero": 0, "fsdp": 1, "fsdp flat": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.inner(inputs).tanh())


def wrapped(kind: str, net: Net) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    if kind == "fsdp2":
        fully_shard(net.inner, mesh=mesh_of("one"))
        fully_shard(net, mesh=mesh_of("one"))
    elif kind in ("ddp", "zero"):
        return DistributedDataParallel(net)
    elif kind.startswith("fsdp"):
        return FullyShardedDataParallel(
            net, use_orig_params=kind == "fsdp", device_id=torch.device("cpu")
        )
    return net


def trained(kind: str, name: str, log: str | None = None) -> Any:
    """Train a few steps, in one process or spread over the ranks, each with its part of a batch.

    Returns:
        The norms of each step, the outputs afterwards, the collectives of a step, and the state.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    net = wrapped(kind, Net())
    if kind == "zero":
        optimizer: Any = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=2.0)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
    options = {"max_norm": 0.05, "log": log, "model": net} | RULES[name]
    if callable(options["max_norm"]):
        options["max_norm"] = options["max_norm"]()
    if kind in ("fsdp", "fsdp flat"):
        options["ranks"] = Ranks(net.process_group)
    clipper = GradientClipper(optimizer, **options)
    norms, size = [], 8 // distributed.get_world_size()
    for step in range(6):
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        if step == 3 and options.get("nonfinite"):
            batch[-1, 0] = math.nan  # on the last rank alone
        optimizer.zero_grad()
        own = batch if kind == "alone" else batch[size * distributed.get_rank() :][:size]
        net(own).square().mean().backward()
        with Recorded() as calls:
            optimizer.step()
        norms.append(clipper.last.norms.tolist())
    clipper.close()
    with torch.no_grad():
        outputs = net(torch.randn(64, 5, generator=torch.Generator().manual_seed(9)))
    return norms, outputs, len(calls), clipper.state_dict()


def check(pool: Any, kind: str, name: str) -> None:
    needed, outputs, _, state = pool.run(trained, "alone", name)[0]
    results = pool.run(trained, kind, name)
    for norms, own, calls, own_state in results:
        assert repr(norms) == repr(results[0][0])  # the same bits on all ranks
        for step, expected in zip(norms, needed, strict=True):
            assert step == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)
        torch.testing.assert_close(own, outputs, rtol=1e-3, atol=1e-5)
        if kind != "zero":  # whose own broadcasts are in its step
            assert calls == COLLECTIVES[kind]
        assert own_state["counters"] == state["counters"]


@pytest.mark.parametrize("name", quick(RULES, "fixed", "each unit", "skipped", "weights"))
@pytest.mark.parametrize("kind", quick(["fsdp2", "ddp"], "fsdp2"))
def test_rules(ranks, kind, name):
    """Under FSDP2 and DDP every rule decides as in one process."""
    check(ranks, kind, name)


@pytest.mark.parametrize("kind", ["zero", "fsdp", "fsdp flat"])
def test_other_wrappers(ranks, kind):
    """ZeroRedundancyOptimizer needs nothing; FullyShardedDataParallel needs ``ranks=``."""
    check(ranks, kind, "skipped")


def test_only_rank_0_logs(two_ranks, tmp_path):
    """It writes into a directory that all ranks were given."""
    two_ranks.run(trained, "fsdp2", "fixed", str(tmp_path / "logs"))
    [file] = (tmp_path / "logs").iterdir()
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in reader.Scalars("grad_norm/pre")] == [*range(6)]


def scaled() -> Any:
    """Train under a GradScaler, with an overflow at the third step on the last rank alone."""
    torch.manual_seed(0)
    net = wrapped("fsdp2", Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 0.05)
    scaler, rows = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(4):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        scaler.scale(net(batch).square().mean()).backward()
        if step == 2 and distributed.get_rank() == distributed.get_world_size() - 1:
            net.head.weight.grad.to_local().view(-1)[:1] = math.inf
            net.inner[0].weight.grad.to_local().view(-1)[:1] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        rows.append((clipper.steps, clipper.last.norm.item(), scaler.get_scale()))
    return rows


def test_an_overflow_on_one_rank(two_ranks):
    """Under FSDP2 it skips the step on all ranks."""
    one, other = two_ranks.run(scaled)
    assert one == other
    steps, norms, scales = zip(*one, strict=True)
    assert steps == (1, 2, 2, 3)
    assert scales == (1024.0, 1024.0, 512.0, 512.0)
    assert all(0 < norm < 100 for norm in norms)
