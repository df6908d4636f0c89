"""FullyShardedDataParallel, ZeroRedundancyOptimizer, and shards within the stages of a pipeline."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import AttachError, GradientClipper, Ranks
from tests.ranks.test_spread import SCOPES, oracle
from tests.ranks.test_training import Net
from tests.support.dtensors import (
    SHAPES,
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    spread,
    spread_alone,
)

LIMIT = 0.05
STEPS = 4


def batch_at(step: int, *, whole: bool) -> Tensor:
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    if step == 2:
        batch[-1, 0] = math.nan  # on the last rank alone
    size = 8 // distributed.get_world_size()
    return batch if whole else batch[size * distributed.get_rank() :][:size]


def trained(kind: str, original: bool = True) -> Any:
    """Train as wrapped, with steps left out where the norm is not finite."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net: nn.Module = Net()
    wrapped, ranks = net, None
    if kind == "fsdp":
        wrapped = FullyShardedDataParallel(
            net, use_orig_params=original, device_id=torch.device("cpu")
        )
        ranks = Ranks(wrapped.process_group)
    elif kind == "zero":
        wrapped = DistributedDataParallel(net)
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=1.0)
    else:
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    clipper = GradientClipper(optimizer, LIMIT, model=wrapped, nonfinite="skip", ranks=ranks)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(batch_at(step, whole=kind == "alone")).square().mean().backward()
        optimizer.step()
        norms.append(clipper.last.norm.item())
    probe = torch.linspace(-1, 1, 15).reshape(3, 5)
    with torch.no_grad():
        return norms, wrapped(probe), clipper.skipped


@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_training_is_that_of_one_process_with_the_whole_batch(ranks, kind):
    needed, output, _ = ranks.run(trained, "alone")[0]
    for norms, own, skipped in ranks.run(trained, kind):
        assert norms == pytest.approx(needed, rel=1e-4, nan_ok=True)
        torch.testing.assert_close(own, output, rtol=1e-3, atol=1e-5)
        assert skipped == 1


@pytest.mark.parametrize("original", [False, True])
def test_flat_parameters_have_the_norm_of_the_whole(two_ranks, original):
    needed, _, _ = two_ranks.run(trained, "alone")[0]
    for norms, _, _ in two_ranks.run(trained, "fsdp", original):
        assert norms == pytest.approx(needed, rel=1e-4, nan_ok=True)


def refusals() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    zero = ZeroRedundancyOptimizer(Net().parameters(), torch.optim.SGD, lr=1.0)
    overlapping = ZeroRedundancyOptimizer(
        Net().parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=1.0
    )
    messages = []
    for optimizer in (torch.optim.SGD(net.parameters(), lr=1.0), zero.optim, overlapping):
        with pytest.raises(AttachError) as caught:
            GradientClipper(optimizer, 1.0)
        messages.append(str(caught.value))
    GradientClipper(torch.optim.SGD(Net().parameters(), lr=1.0), 1.0)  # another one is fine
    return messages


def rows_of_flat() -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    net = FullyShardedDataParallel(Net(), **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with pytest.raises(AttachError) as caught:
        GradientClipper(optimizer, 1.0, scope="unit", model=net, ranks=Ranks())
    return str(caught.value)


def test_rows_of_what_was_made_flat_are_not_known(two_ranks):
    for message in two_ranks.run(rows_of_flat):
        assert "is it known which indices of dimension 0 a rank holds" in message


def test_parts_of_gradients_are_refused_with_the_remedy(two_ranks):
    for flat, inner, overlapping in two_ranks.run(refusals):
        assert "give ranks=gradclip.Ranks(the wrapped module's process_group)" in flat
        assert "inner one of a ZeroRedundancyOptimizer" in inner
        assert "has overlap_with_ddp=True and steps inside backward()" in overlapping


def staged(across: str, scope: str, order: float) -> Any:
    """Clip DTensors of two stages, each of which is spread over two of the four ranks."""
    stage = mesh_of("a").get_local_rank()  # dimension "a" is that of the stages, "b" of the shards
    parameters = {}
    for index, (name, gradient) in enumerate(full_gradients(torch.float32).items()):
        if index % 2 == stage:
            mesh, placements = mesh_of("b"), placements_of("0")
            parameters[name] = nn.Parameter(spread(torch.zeros_like(gradient), mesh, placements))
            parameters[name].grad = spread(gradient, mesh, placements)
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    group = {"stages": mesh_of("a"), "all": None}[across]
    clipper = GradientClipper(optimizer, 0.7, scope=scope, norm_type=order, ranks=Ranks(group))
    with Recorded() as calls:
        optimizer.step()
    norms = dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True))
    return norms, {name: p.grad.full_tensor() for name, p in parameters.items()}, calls


@pytest.mark.slow
@pytest.mark.parametrize("order", [2.0, math.inf])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("across", "collectives"), [("stages", 2), ("all", 1)])
def test_dtensors_within_stages_count_once(four_ranks, across, collectives, scope, order):
    norms, clipped = oracle(full_gradients(torch.float32), scope, order, 0.7)
    each = four_ranks.run(staged, across, scope, order)
    for own, gradients, calls in each:
        assert own == each[0][0]
        assert sorted(own.values()) == pytest.approx(sorted(norms), rel=1e-6)
        assert calls == ["allreduce"] * collectives
        assert len(gradients) == len(SHAPES) // 2
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient.double(), clipped[name], rtol=1e-6, atol=1e-30)


def tied_shards() -> float:
    """Two stages of DTensors on two ranks each, with a copy of one embedding in both."""
    stage, mesh = mesh_of("a").get_local_rank(), mesh_of("b")
    named = {f"own{stage}": torch.full((4,), 1.0 + stage), "embed": torch.full((6,), 2.0)}
    parameters = {}
    for name, gradient in named.items():
        parameters[name] = nn.Parameter(
            spread(torch.zeros_like(gradient), mesh, placements_of("0"))
        )
        parameters[name].grad = spread(gradient, mesh, placements_of("0"))
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    clipper = GradientClipper(optimizer, None, ranks=Ranks(replicated="embed"))
    optimizer.step()
    return round(clipper.last.norm.square().item(), 6)


@pytest.mark.slow
def test_of_a_copied_dtensor_all_shards_of_one_copy_count(four_ranks):
    assert four_ranks.run(tied_shards) == [4 * 1 + 4 * 4 + 6 * 4] * 4


def on_some_of_a_mesh() -> str:
    """DTensors on all four ranks, and a group of the first three of them."""
    group = distributed.new_group([0, 1, 2])
    if distributed.get_rank() == 3:
        return ""
    weight = nn.Parameter(spread_alone(torch.zeros(4), mesh_of("one"), placements_of("0")))
    with pytest.raises(AttachError) as caught:
        GradientClipper(torch.optim.SGD([weight], lr=0.1), 1.0, ranks=Ranks(group))
    return str(caught.value)


@pytest.mark.slow
def test_a_group_with_some_of_a_mesh_is_refused(four_ranks):
    for message in four_ranks.run(on_some_of_a_mesh)[:3]:
        assert "lie on the ranks [0, 1, 2, 3], of which ranks= has [0, 1, 2]" in message


def whole_in_fsdp1(replicated: str | tuple[()]) -> float:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    module = FullyShardedDataParallel(
        nn.Linear(3, 2),
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    ranks = Ranks(module.process_group, replicated=replicated)
    clipper = GradientClipper(optimizer, None, model=module, ranks=ranks)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return clipper.last.norm.square().item()


@pytest.mark.slow
def test_without_shards_fsdp1_holds_copies(four_ranks):
    """The gradient has 8 elements of 1."""
    assert four_ranks.run(whole_in_fsdp1, "*") == [pytest.approx(8.0)] * 4
    assert four_ranks.run(whole_in_fsdp1, ()) == [pytest.approx(32.0)] * 4
