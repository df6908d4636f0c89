"""FullyShardedDataParallel, ZeroRedundancyOptimizer, and DTensors within pipeline stages."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import AttachError, GradientClipper, Ranks
from tests.ranks.test_training import Net, spread_module
from tests.support.dtensors import (
    SCOPES,
    check_clipped,
    clip_named,
    full_gradients,
    mesh_of,
    spread,
    spread_parameter,
)
from tests.support.processes import on_ranks


def attach(case: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    if case.startswith("flat"):
        net = spread_module(Net(), "fsdp")
        rows = {"scope": "unit", "model": net, "ranks": Ranks()} if case == "flat rows" else {}
        GradientClipper(torch.optim.SGD(net.parameters(), lr=1.0), 1.0, **rows)
    else:
        options = {"overlap_with_ddp": case == "overlapping optimizer", "lr": 1.0}
        zero = ZeroRedundancyOptimizer(Net().parameters(), torch.optim.SGD, **options)
        GradientClipper(zero.optim if case == "inner optimizer" else zero, 1.0)


REFUSED = {
    "flat shards": "give ranks=gradclip.Ranks(the wrapped module's process_group)",
    "flat rows": "is it known which indices of dimension 0 a rank holds",
    "inner optimizer": "inner one of a ZeroRedundancyOptimizer",
    "overlapping optimizer": "has overlap_with_ddp=True and steps inside backward()",
}


@pytest.mark.parametrize("case", REFUSED)
@on_ranks("two_ranks")
def test_refusals(case):
    """Parts of gradients are refused, with the remedy, and another clipper can attach."""
    with pytest.raises(AttachError, match=re.escape(REFUSED[case])):
        attach(case)
    GradientClipper(torch.optim.SGD(Net().parameters(), lr=1.0), 1.0)


@pytest.mark.slow
@on_ranks("four_ranks")
def test_a_group_of_some_ranks_of_a_mesh():
    """It is refused, as its DTensors could not count once."""
    weight = nn.Parameter(spread(torch.zeros(4), "one", "0"))
    group = distributed.new_group([0, 1, 2])
    if distributed.get_rank() < 3:
        needed = r"on the ranks \[0, 1, 2, 3\], of which the group in ranks= has \[0, 1, 2\]"
        with pytest.raises(AttachError, match=needed):
            GradientClipper(torch.optim.SGD([weight], lr=0.1), 1.0, ranks=Ranks(group))


def in_stages(gradients: dict[str, Tensor], **options: Any) -> Any:
    """Clip DTensors that are spread over the ranks of a stage: mesh "a" is across the stages."""
    named = {name: spread_parameter(each, "b", "0") for name, each in gradients.items()}
    return clip_named(named, **options)


def staged(across: str, scope: str, order: float) -> Any:
    """Clip two stages of two ranks each, with every second parameter."""
    full = [*full_gradients().items()][mesh_of("a").get_local_rank() :: 2]
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
        full_gradients(),
        scope,
        order,
        collectives=collectives,
        part=lambda clipped, rank: dict([*clipped.items()][rank // 2 :: 2]),
    )


@pytest.mark.slow
@on_ranks("four_ranks")
def test_a_copied_dtensor():
    """Of two stages with a copy of one embedding in both, all shards of one copy count."""
    stage = mesh_of("a").get_local_rank()
    gradients = {f"own{stage}": torch.full((4,), 1.0 + stage), "embed": torch.full((6,), 2.0)}
    norms, *_ = in_stages(gradients, max_norm=None, ranks=Ranks(replicated="embed"))
    assert norms["global"] ** 2 == pytest.approx(4 * 1 + 4 * 4 + 6 * 4)


@pytest.mark.parametrize(("replicated", "square"), [("*", 8.0), ((), 32.0)])
@pytest.mark.slow
@on_ranks("four_ranks")
def test_fsdp1_without_shards(replicated, square):
    """It holds copies, which ``replicated=`` says. The gradient has 8 elements of 1."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    options = {"sharding_strategy": ShardingStrategy.NO_SHARD, "device_id": torch.device("cpu")}
    module = FullyShardedDataParallel(nn.Linear(3, 2), **options)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    ranks = Ranks(module.process_group, replicated=replicated)
    clipper = GradientClipper(optimizer, None, model=module, ranks=ranks)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert clipper.last.norm.square().item() == pytest.approx(square)
