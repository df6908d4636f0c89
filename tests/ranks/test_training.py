"""Training on several ranks is that of one process with the whole batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, distributed, nn

from gradclip import GradientClipper
from tests.support.dtensors import Recorded, mesh_of, quick


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False))
        self.head = nn.Linear(3, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.inner(inputs).tanh())


def trained(
    kind: str,
    options: dict[str, Any],
    log: str | None = None,
    steps: tuple[int, int] = (0, 6),
    begun: Any = None,
) -> Any:
    """Train a few steps, in one process or spread over the ranks, each with its part of a batch."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net: nn.Module = Net()
    if begun is not None:
        _, weights, _, state = begun
        net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))
    wrapped = net
    if kind == "fsdp2":
        fully_shard(net.inner, mesh=mesh_of("one"))
        fully_shard(net, mesh=mesh_of("one"))
    elif kind == "ddp":
        wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
    options = {"max_norm": 0.05} | options
    clipper = GradientClipper(optimizer, model=net, log=log, **options)
    if begun is not None:
        clipper.load_state_dict(state)
    norms = []
    rank, size = distributed.get_rank(), 8 // distributed.get_world_size()
    for step in range(*steps):
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        if step == 3 and options.get("nonfinite"):
            batch[-1, 0] = math.nan  # on the last rank alone
        own = batch if kind == "alone" else batch[size * rank : size * (rank + 1)]
        optimizer.zero_grad()
        wrapped(own).square().mean().backward()
        with Recorded() as calls:
            optimizer.step()
        norms.append(clipper.last.norms.tolist())
    clipper.close()
    weights = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]
    return norms, weights, len(calls), clipper.state_dict()


RULES = {
    "fixed": {},
    "each parameter": {"scope": "parameter", "max_norm": 0.01},
    "each unit": {"scope": "unit", "max_norm": 0.005},
    "largest element": {"norm_type": math.inf, "max_norm": 0.01},
    "left out": {"nonfinite": "skip"},
    "erased": {"nonfinite": "zero"},
    "percentile": {"max_norm": "percentile", "scope": "unit"},
    "weights": {"max_norm": "weights", "scope": "unit"},
}


def with_rule(kind: str, name: str, *rest: Any) -> Any:
    from gradclip.thresholds import Percentile, RelativeToWeights

    options = dict(RULES[name])
    made = {"percentile": Percentile(50), "weights": RelativeToWeights(0.01)}
    options["max_norm"] = made.get(options.get("max_norm"), options.get("max_norm", 0.05))
    return trained(kind, options, *rest)


@pytest.mark.parametrize("name", quick(RULES, "fixed", "each unit", "left out", "weights"))
@pytest.mark.parametrize("kind", quick(["fsdp2", "ddp"], "fsdp2"))
def test_training_is_that_of_one_process_with_the_whole_batch(ranks, kind, name):
    needed, weights, _, state = ranks.run(with_rule, "alone", name)[0]
    found = ranks.run(with_rule, kind, name)
    for own, own_weights, calls, own_state in found:
        for norms, expected in zip(own, needed, strict=True):
            assert norms == pytest.approx(expected, rel=1e-4, abs=1e-7, nan_ok=True)
        for one, other in zip(own_weights, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        if kind == "fsdp2":
            assert calls == 1
        else:
            assert calls == 0
        assert own_state["counters"] == state["counters"]
        assert repr(own) == repr(found[0][0])  # the same bits on all ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fixed", "percentile"])
def test_a_run_of_four_ranks_goes_on_with_two(two_ranks, four_ranks, name):
    needed = two_ranks.run(with_rule, "alone", name)[0]
    states = four_ranks.run(with_rule, "fsdp2", name, None, (0, 3))
    assert len({repr(state) for *_, state in states}) == 1  # equal on all ranks
    for norms, weights, _, state in two_ranks.run(
        with_rule, "fsdp2", name, None, (3, 6), states[0]
    ):
        for own, expected in zip(norms, needed[0][3:], strict=True):
            assert own == pytest.approx(expected, rel=1e-4)
        for one, other in zip(weights, needed[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
        assert state["steps"] == 6
        assert state["counters"] == needed[3]["counters"]


def test_only_the_first_rank_writes_into_a_directory(two_ranks, tmp_path):
    two_ranks.run(with_rule, "fsdp2", "fixed", str(tmp_path / "logs"))
    [file] = (tmp_path / "logs").iterdir()
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in reader.Scalars("grad_norm/pre")] == [*range(6)]


def scaled() -> Any:
    """Train under a GradScaler, with an overflow at the third step on the last rank alone."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = Net()
    fully_shard(net, mesh=mesh_of("one"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    clipper = GradientClipper(optimizer, 0.05)
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for step in range(4):
        batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        scaler.scale(net(batch).square().mean()).backward()
        if step == 2 and distributed.get_rank() == distributed.get_world_size() - 1:
            net.head.weight.grad.to_local().view(-1)[:1] = math.inf
            net.inner[0].weight.grad.to_local().view(-1)[:1] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append((clipper.steps, clipper.last.norm.item(), scaler.get_scale()))
    return seen


def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(two_ranks):
    one, other = two_ranks.run(scaled)
    assert one == other
    assert [steps for steps, _, _ in one] == [1, 2, 2, 3]
    assert [scale for _, _, scale in one] == [1024.0, 1024.0, 512.0, 512.0]
    assert all(0 < norm < 100 for _, norm, _ in one)
