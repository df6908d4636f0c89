"""FullyShardedDataParallel, ZeroRedundancyOptimizer, and DTensors within pipeline stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks
from tests.ranks.test_training import Net, spread_module
from tests.support.dtensors import (
    SCOPES,
    check_clipped,
    clip_named,
    full_gradients,
    mesh_of,
    spread_alone,
    spread_parameter,
)


def attach(case: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if case.startswith("flat"):
        net, rows = spread_module(Net(), "fsdp"), case == "flat rows"
        options = {"scope": "unit", "model": net, "ranks": Ranks()} if rows else {}
        GradientClipper(torch.optim.SGD(net.parameters(), lr=1.0), 1.0, **options)
    elif case == "some ranks of a mesh":
        mesh_of("one")
        group = distributed.new_group([0, 1, 2])
        if distributed.get_rank() < 3:
            weight = nn.Parameter(spread_alone(torch.zeros(4), "0"))
            GradientClipper(torch.optim.SGD([weight], lr=0.1), 1.0, ranks=Ranks(group))
    elif case == "a plain module":
        GradientClipper(torch.optim.SGD(Net().parameters(), lr=1.0), 1.0)
    else:
        overlaps = case == "overlapping optimizer"
        zero = ZeroRedundancyOptimizer(
            Net().parameters(), torch.optim.SGD, overlap_with_ddp=overlaps, lr=1.0
        )
        GradientClipper(zero if overlaps else zero.optim, 1.0)


REFUSED = {
    "flat shards": "give ranks=gradclip.Ranks(the wrapped module's process_group)",
    "flat rows": "is it known which indices of dimension 0 a rank holds",
    "inner optimizer": "inner one of a ZeroRedundancyOptimizer",
    "overlapping optimizer": "has overlap_with_ddp=True and steps inside backward()",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(two_ranks, case):
    """Parts of gradients are refused, with the remedy, and another clipper can attach."""
    for message in two_ranks.errors(attach, case):
        assert message.startswith("AttachError")
        assert REFUSED[case] in message
    assert two_ranks.errors(attach, "a plain module") == ["", ""]


@pytest.mark.slow
def test_a_group_of_some_ranks_of_a_mesh(four_ranks):
    """It is refused, as its DTensors could not count once."""
    *messages, _ = four_ranks.errors(attach, "some ranks of a mesh")
    for message in messages:
        assert "on the ranks [0, 1, 2, 3], of which the group in ranks= has [0, 1, 2]" in message


def in_stages(gradients: dict[str, Tensor], **options: Any) -> Any:
    """Clip DTensors that are spread over the ranks of a stage: mesh "a" is across the stages."""
    named = {name: spread_parameter(each, "b", "0") for name, each in gradients.items()}
    return clip_named(named, **options)


def staged(across: str, scope: str, order: float) -> Any:
    """Clip two stages of two ranks each, with every second parameter."""
    full = [*full_gradients(torch.float32).items()][mesh_of("a").get_local_rank() :: 2]
    ranks = Ranks({"stages": mesh_of("a"), "all": None}[across])
    return in_stages(dict(full), scope=scope, norm_type=order, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("across", "collectives"), [("stages", 2), ("all", 1)])
def test_dtensors_within_stages(four_ranks, across, collectives, scope, order):
    """They count once, whether ``ranks=`` has the ranks of a mesh or one rank of each."""
    check_clipped(
        four_ranks.run(staged, across, scope, order),
        full_gradients(torch.float32),
        scope,
        order,
        collectives=collectives,
        part=lambda clipped, rank: dict([*clipped.items()][rank // 2 :: 2]),
    )


def tied_dtensors() -> float:
    """Two stages with a copy of one embedding in both."""
    stage = mesh_of("a").get_local_rank()
    gradients = {f"own{stage}": torch.full((4,), 1.0 + stage), "embed": torch.full((6,), 2.0)}
    norms, *_ = in_stages(gradients, max_norm=None, ranks=Ranks(replicated="embed"))
    return round(norms["global"] ** 2, 6)


@pytest.mark.slow
def test_a_copied_dtensor(four_ranks):
    """All shards of one copy count."""
    assert four_ranks.run(tied_dtensors) == [4 * 1 + 4 * 4 + 6 * 4] * 4


def without_shards(replicated: str | tuple[()]) -> float:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    options = {"sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": torch.device("cpu")}
    module = FullyShardedDataParallel(nn.Linear(3, 2), **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    ranks = Ranks(module.process_group, replicated=replicated)
    clipper = GradientClipper(optimizer, None, model=module, ranks=ranks)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return clipper.last.norm.square().item()


@pytest.mark.slow
def test_fsdp1_without_shards(four_ranks):
    """It holds copies, which ``replicated=`` says. The gradient has 8 elements of 1."""
    assert four_ranks.run(without_shards, "*") == [pytest.approx(8.0)] * 4
    assert four_ranks.run(without_shards, ()) == [pytest.approx(32.0)] * 4
