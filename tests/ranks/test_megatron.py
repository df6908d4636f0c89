"""Tensor parallelism without DTensors, as in Megatron-LM, a sequence spread before the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks
from tests.support.dtensors import Recorded

WIDTH, HIDDEN, LENGTH, STEPS = 4, 8, 4, 3
LIMIT = 0.3


class Gather(torch.autograd.Function):
    """Put a sequence together; of the gradient each rank gets the sum for its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return own_rows(summed(gradient))


class Scatter(torch.autograd.Function):
    """Add up over the ranks, and keep a part of the sequence; the gradient is put together."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return own_rows(summed(partial))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = [torch.empty_like(gradient) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, gradient.contiguous())
        return torch.cat(parts)


def summed(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    distributed.all_reduce(total)
    return total


def own_rows(tensor: Tensor) -> Tensor:
    return tensor.chunk(distributed.get_world_size())[distributed.get_rank()]


class Block(nn.Module):
    """A norm and two layers, of which ranks have columns and rows where it is parallel."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        up, down = torch.randn(HIDDEN, WIDTH), torch.randn(WIDTH, HIDDEN)
        self.parallel = parallel
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Parameter(own_rows(up).clone() if parallel else up)
        self.down = nn.Parameter(own_rows(down.T).T.clone() if parallel else down)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = Gather.apply(x) if self.parallel else x
        x = (x @ self.up.T).tanh() @ self.down.T
        return Scatter.apply(x) if self.parallel else x

    def share_gradients(self) -> None:
        """Add up the gradients of the layer norm, each rank having seen a part of the sequence."""
        for parameter in self.norm.parameters():
            distributed.all_reduce(parameter.grad)


def trained(parallel: bool, scope: str, replicated: str | tuple[()]) -> Any:
    block = Block(parallel).double()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    ranks = Ranks(replicated=replicated) if parallel else None
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, model=block, ranks=ranks)
    found, most = [], 0
    for step in range(STEPS):
        x = torch.randn(LENGTH, WIDTH, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        out = block(own_rows(x) if parallel else x)
        out.square().sum().backward()
        if parallel:
            block.share_gradients()
        with Recorded() as calls:
            optimizer.step()
        most = max(most, len(calls))
        found.append(dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True)))
    return found, {name: p.detach() for name, p in block.named_parameters()}, most


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_training(ranks, scope):
    """Norms and weights are those of one process, with one collective a step."""
    needed, weights, _ = ranks.run(trained, False, scope, ())[0]
    each = ranks.run(trained, True, scope, "norm.*")
    count = len(each)
    for rank, (found, own, most) in enumerate(each):
        assert most == 1
        for norms, expected in zip(found, needed, strict=True):
            assert norms == pytest.approx(expected, rel=1e-9)
        torch.testing.assert_close(own["up"], weights["up"].chunk(count)[rank])
        torch.testing.assert_close(own["down"], weights["down"].chunk(count, 1)[rank])
        torch.testing.assert_close(own["norm.weight"], weights["norm.weight"])


def test_without_replicated(two_ranks):
    """Copies count on every rank, which shows that the test above can fail."""
    [needed, *_], _, _ = two_ranks.run(trained, False, "global", ())[0]
    for [norms, *_], _, _ in two_ranks.run(trained, True, "global", ()):
        assert norms["global"] > 1.01 * needed["global"]


def tied_shards() -> dict[str, float]:
    """Two stages with two shards each, and a copy of one embedding in both, by another name."""
    stage, tp_rank = divmod(distributed.get_rank(), 2)
    own, copy = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    own.grad, copy.grad = torch.tensor([3.0]), torch.full((2,), 1.0 + tp_rank)
    name = ("embed.weight", "head.weight")[stage]
    optimizer = torch.optim.SGD([(f"own{stage}", own), (name, copy)], lr=0.0)
    ranks = Ranks(
        replicated=lambda name, p: (
            f"tied/{tp_rank}" if name in ("embed.weight", "head.weight") else None
        )
    )
    clipper = GradientClipper(optimizer, None, scope="parameter", ranks=ranks)
    clipper.step()
    squares = clipper.last.norms.square().tolist()
    return dict(zip(clipper.labels, squares, strict=True))


@pytest.mark.slow
def test_copied_shards(four_ranks):
    """Of each shard of the embedding one copy counts, and of other parameters both shards."""
    needed = {"embed.weight": 2 * 1 + 2 * 4, "own0": 2 * 9, "own1": 2 * 9}
    assert four_ranks.run(tied_shards) == [pytest.approx(needed)] * 4
