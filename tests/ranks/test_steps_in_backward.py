"""Steps inside backward under FSDP2, and why not under DistributedDataParallel."""

from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gradclip import AttachError, GradientClipper, Ranks
from tests.support.dtensors import mesh_of, norms_by_label, recorded, whole
from tests.support.processes import on_ranks

LIMIT = 0.05


def net_of_two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def released_training(scope: str, *, inside: bool, alone: bool) -> Any:
    """Train a few steps; return norms and whole parameters after each."""
    from torch.distributed.fsdp import fully_shard

    net = net_of_two()
    for layer in () if alone else (net[0], net[2], net):
        fully_shard(layer, mesh=mesh_of("one"))
    optimizers = {p: torch.optim.SGD([p], lr=0.5) for p in net.parameters()}
    clipper = GradientClipper([*optimizers.values()], LIMIT, scope=scope, model=net)

    def step(parameter: nn.Parameter) -> None:
        with recorded() as collectives:
            optimizers[parameter].step()
        assert collectives == ([] if alone else ["sum"])
        optimizers[parameter].zero_grad()

    for parameter in net.parameters() if inside else ():
        parameter.register_post_accumulate_grad_hook(step)
    rank, count, steps = distributed.get_rank(), distributed.get_world_size(), []
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        batch = torch.randn(4 * count, 4, generator=generator, dtype=torch.float64)
        own = batch if alone else batch[4 * rank : 4 * rank + 4]
        (net(own).square().mean() * (5.0 if index % 2 else 0.1)).backward()
        if not inside:
            clipper.step()
            clipper.zero_grad()
        named = {name: whole(p) for name, p in net.named_parameters()}
        steps.append((norms_by_label(clipper), named))
    assert clipper.steps == 4
    assert 0 < clipper.clip_rate() < 1
    return steps


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@on_ranks("two_ranks")
def test_sharded_parameters(scope):
    """Step as soon as their gradients are reduced, by the norms of the whole, in one collective."""
    needed = released_training(scope, inside=False, alone=True)
    torch.testing.assert_close(released_training(scope, inside=True, alone=False), needed)


@pytest.mark.parametrize("scope", ["global", "parameter"])
@on_ranks("two_ranks")
def test_gradients_that_are_averaged_later_are_refused(scope):
    """So is one norm over all under FSDP2, though its parameters are not in the graph."""
    from torch.distributed.fsdp import fully_shard

    net: Any = net_of_two()
    model = DistributedDataParallel(net) if scope == "parameter" else fully_shard(net)
    optimizers = {p: torch.optim.SGD([p], lr=0.5) for p in net.parameters()}
    GradientClipper([*optimizers.values()], LIMIT, scope=scope)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    text = "before DistributedDataParallel has av" if scope == "parameter" else "are not there yet"
    with pytest.raises(AttachError, match=text):
        model(torch.ones(2, 4, dtype=torch.float64)).sum().backward()


@on_ranks("two_ranks")
def test_parameters_that_lie_on_other_ranks_are_refused():
    """With ranks=, the others need not step at the same time."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([(f"stage{distributed.get_rank()}", weight)], lr=1.0)
    GradientClipper(optimizer, 1.0, scope="parameter", ranks=Ranks(distributed.group.WORLD))
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(AttachError, match="ranks=, whose other ranks need not step"):
        (weight * 5).sum().backward()
    assert weight.tolist() == [1.0, 1.0]
