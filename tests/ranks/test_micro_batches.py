"""Micro-batches under DistributedDataParallel and FSDP2 and across ranks, against one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gradclip import AttachError, GradientClipper, Ranks
from tests.support.dtensors import mesh_of, oracle, recorded, whole
from tests.support.processes import on_ranks
from tests.support.reference import bits_in

LIMIT, COUNT = 0.5, 3
SCALES = (0.1, 30.0, 1.0)


def double_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def inputs_of(index: int, rank: int | None = None) -> Tensor:
    """Return the inputs of a micro-batch, of one rank or of all."""
    generator = torch.Generator().manual_seed(index)
    count = distributed.get_world_size()
    inputs = torch.randn(4 * count, 4, generator=generator, dtype=torch.float64)
    return inputs if rank is None else inputs[4 * rank : 4 * rank + 4]


def loss_on(net: nn.Module, index: int, rank: int | None = None) -> Tensor:
    return net(inputs_of(index, rank)).square().mean() * SCALES[index] / COUNT


def averaged_sums(scope: str = "global", ranks: Any = (None,)) -> dict[str, Tensor]:
    """Return the average over the parts of the sums of clipped micro-batches, in one process."""
    net = double_net()
    named = dict(net.named_parameters())
    sums = {name: torch.zeros_like(p) for name, p in named.items()}
    for rank in ranks:
        for index in range(COUNT):
            loss = loss_on(net, index, rank)
            gradients = torch.autograd.grad(loss, [*named.values()])
            full = dict(zip(named, gradients, strict=True))
            for name, gradient in oracle(full, scope, 2.0, LIMIT / COUNT)[1].items():
                sums[name] += gradient / len(ranks)
    return sums


def averaging(kind: str) -> tuple[Any, nn.Module]:
    """Return a module that averages gradients, and the module with the plain names."""
    net = double_net()
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh_of("one"))
        return net, net
    return DistributedDataParallel(net, gradient_as_bucket_view=kind == "ddp views"), net


def check_accumulated(net: nn.Module, needed: dict[str, Tensor]) -> None:
    found = {name: whole(p.grad) for name, p in net.named_parameters()}
    torch.testing.assert_close(found, needed)


KINDS = pytest.mark.parametrize("kind", ["ddp", "ddp views", "fsdp2"])


@KINDS
@pytest.mark.parametrize("scope", ["global", "unit"])
@on_ranks("two_ranks")
def test_averaged_micro_batches(kind, scope):
    """Each is averaged by its backward pass and then clipped, by the norms of the whole."""
    model, net = averaging(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, model=net)
    needed = averaged_sums(scope)
    for _ in range(2):
        for index in range(COUNT):
            loss = loss_on(model, index, distributed.get_rank())
            with clipper.micro_batch(of=COUNT):
                loss.backward()
        check_accumulated(net, needed)
        optimizer.step()
        assert clipper.last.coefficients.tolist() == [1.0] * len(clipper.labels)
        optimizer.zero_grad()
    assert 2 <= clipper.micro_batches.clipped < 6


@on_ranks("two_ranks")
def test_one_collective_for_each_micro_batch():
    model, net = averaging("fsdp2")
    clipper = GradientClipper(torch.optim.SGD(net.parameters(), lr=0.0), LIMIT)
    loss = loss_on(model, 0, distributed.get_rank())
    with recorded() as calls, clipper.micro_batch(of=COUNT):
        loss.backward()
    assert calls.count("sum") == 1


@pytest.mark.parametrize("kind", ["ddp", "ddp views"])
@on_ranks("two_ranks")
def test_micro_batches_without_averaging(kind):
    """Under no_sync() each rank clips its own; averaged by hand they are within the threshold."""
    model, net = averaging(kind)
    clipper = GradientClipper(torch.optim.SGD(net.parameters(), lr=0.0), LIMIT, model=net)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    for _ in range(2):
        for index in range(COUNT):
            with model.no_sync(), clipper.micro_batch(of=COUNT):
                loss_on(model, index, rank).backward()
        for parameter in net.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= count
        check_accumulated(net, averaged_sums(ranks=range(count)))
        clipper.step()
        assert clipper.last.coefficient == 1
        clipper.zero_grad()


@pytest.mark.parametrize("kind", ["ddp", "ddp views"])
@pytest.mark.parametrize("inside", [True, False], ids=["no_sync outside", "no_sync inside"])
@on_ranks("two_ranks")
def test_averaging_the_last_micro_batch_alone_is_refused(kind, inside):
    """As in torch's own recipe, which would leave the others on their ranks."""
    model, net = averaging(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, model=net)
    rank = distributed.get_rank()
    blocks = [clipper.micro_batch(of=2), model.no_sync()]
    with blocks[not inside], blocks[inside]:
        loss_on(model, 0, rank).backward()
    before = bits_in([p.grad for p in net.parameters()])
    block = clipper.micro_batch(of=2)
    with pytest.raises(AttachError, match="while others were accumulated under no_sync"), block:
        loss_on(model, 1, rank).backward()
    assert bits_in([p.grad for p in net.parameters()]) == before


@pytest.mark.parametrize("within", [True, False])
@on_ranks("two_ranks")
def test_gradients_that_fsdp2_keeps_are_refused(within):
    """Before the backward pass, or after it where the module was told within the block."""
    model, net = averaging("fsdp2")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, model=net)
    loss = loss_on(model, 0, distributed.get_rank())

    entered = []

    def backward() -> None:
        with clipper.micro_batch(of=2):
            entered.append(within)
            model.set_requires_gradient_sync(False)
            loss.backward()

    model.set_requires_gradient_sync(within)
    with pytest.raises(AttachError, match="FSDP2 keeps the gradients of this backward pass"):
        backward()
    assert entered == [True] * within
    assert [p.grad for p in net.parameters()] == [None] * 4


@on_ranks("two_ranks")
def test_fsdp1_is_refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(
        double_net(), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, ranks=Ranks(model.process_group))
    with pytest.raises(AttachError, match="use fully_shard"):
        clipper.micro_batch(of=2)


@on_ranks("two_ranks")
def test_stages_of_a_pipeline_share_the_norm_of_a_micro_batch():
    """A rank without a gradient takes part, too."""
    rank = distributed.get_rank()
    weight = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = torch.optim.SGD([(f"stage{rank}", weight)], lr=0.0)
    clipper = GradientClipper(optimizer, 2.0, ranks=Ranks(distributed.group.WORLD))
    given = [[3.0, 4.0], [0.0, 1.0], [0.3, 0.4]]
    for index, gradient in enumerate(given):
        with clipper.micro_batch(of=4):
            factor = (2.0 if rank else 0.0) if index == 0 else 1.0
            (weight * torch.tensor(gradient) * factor).sum().backward()
    # Norms 10, sqrt(2) and sqrt(1/2), the last of which is below 2 / 4 = 0.5 times sqrt(2).
    joint = [10.0, 2**0.5, 0.5**0.5]
    factors = [min(1.0, 0.5 / norm) for norm in joint]
    factors[0] *= 2.0 if rank else 0.0
    needed = torch.tensor(factors, dtype=torch.float64) @ torch.tensor(given, dtype=torch.float64)
    torch.testing.assert_close(weight.grad, needed)
    optimizer.step()
    assert clipper.micro_batches == (3, 3, 0)
