"""Ranks whose models are wrapped in different ways, or moved after a clipper was attached."""

import pytest
import torch
from torch import distributed, nn

from gradclip import GradientClipper, Ranks
from tests.support.dtensors import whole
from tests.support.processes import on_ranks


@on_ranks("two_ranks")
def test_names_are_matched_by_the_plain_model():
    """A copy is one whatever its rank has wrapped it in, and patterns name what is inside."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    if distributed.get_rank():
        model = torch.compile(nn.parallel.DataParallel(model), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"scope": "parameter", "model": model, "ranks": Ranks(replicated="1.*")}
    clipper = GradientClipper(optimizer, 1.0, **options)
    assert clipper.labels == ("0.weight", "1.weight")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clipper.step()
    # Four elements are shards of one parameter on two ranks, or copies that count once.
    assert clipper.last.norm.tolist() == pytest.approx([3 * 8**0.5, 3 * 4**0.5])


def sharded(net: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Shard a model, and give its new parameters to the optimizer."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(net)
    optimizers[0].param_groups[0]["params"][:] = net.parameters()


@pytest.mark.parametrize("scope", ["global", "parameter"])
@pytest.mark.parametrize("case", ["moved", "moved, of several optimizers", "sharded"])
@on_ranks("two_ranks")
def test_a_model_is_moved_or_sharded_between_steps(case, scope):
    """FSDP2 swaps tensors where it moves them, and new parameters where it shards a model."""
    from torch.distributed.fsdp import fully_shard

    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    if case != "sharded":
        fully_shard(net)
    split = [[p] for p in net.parameters()] if "several" in case else [net.parameters()]
    optimizers = [torch.optim.SGD(parameters, lr=0.01) for parameters in split]
    clipper = GradientClipper(optimizers, 0.5, model=net, scope=scope)
    for step in range(4):
        if step == 2:
            sharded(net, optimizers) if case == "sharded" else net.to("cpu")
        net.zero_grad()
        net(torch.ones(3, 4) * (step + 1 + distributed.get_rank())).square().sum().backward()
        needed = [whole(p.grad).double().norm().item() for p in net.parameters()]
        clipper.step()
        norms = [whole(p.grad).double().norm().item() for p in net.parameters()]
        if scope == "global":
            assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(0.5)
            needed = [sum(norm**2 for norm in needed) ** 0.5]
        else:
            assert norms == pytest.approx([min(norm, 0.5) for norm in needed])
        assert clipper.last.norms.tolist() == pytest.approx(needed)
