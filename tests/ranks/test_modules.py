"""Modules that torch spreads over ranks, against the whole gradients and one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper
from gradclip.thresholds import Percentile
from tests.support.dtensors import INF, SCOPES, mesh_of, oracle, quick

LIMITS = {"global": 0.1, "parameter": 0.05, "unit": 0.02}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 7)
        self.down = nn.Linear(7, 3)

    def forward(self, inputs: Tensor, _: Tensor) -> Tensor:
        return self.down(self.up(self.norm(inputs)).tanh()) + 0.5


class Experts(nn.Module):
    """Each token goes to one of four experts, wherever that is, and its result comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 5)
        self.experts = nn.Parameter(torch.randn(4, 5, 3) / 3)
        self.mesh: Any = None

    def forward(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        from torch.distributed import _functional_collectives as collectives

        tokens, weights, mesh = self.dense(inputs).tanh(), self.experts, self.mesh
        if mesh is not None:
            weights = weights.to_local()
            tokens = collectives.all_gather_tensor_autograd(tokens, 0, mesh.get_group())
            chosen = collectives.all_gather_tensor(chosen, 0, mesh.get_group())
            chosen = chosen - len(weights) * mesh.get_local_rank()
        results = 0 * tokens[:, :3]
        for index in range(len(weights)):
            own = (chosen == index)[:, None]
            if own.any():
                results = torch.where(own, tokens @ weights[index], results)
        if mesh is not None:
            results = collectives.reduce_scatter_tensor_autograd(
                results, "sum", 0, mesh.get_group()
            )
        return results + 0.5

    def add_up(self) -> None:
        """Average the gradients of the experts as those of the rest are, over copies as well."""
        if self.mesh is None or self.experts.grad is None:
            return
        local = self.experts.grad.to_local()
        local /= distributed.get_world_size()
        if self.mesh.size() < distributed.get_world_size():
            distributed.all_reduce(local, group=mesh_of("a").get_group())


@cache
def mesh_of_experts() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("experts",))


def over_tensors(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "norm": SequenceParallel(sequence_dim=0),
        "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "down": RowwiseParallel(),
    }
    parallelize_module(net, mesh, plan)


def fully_sharded(net: nn.Module, mesh: Any, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.up, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)


def experts_over(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    fully_shard(net.dense, mesh=mesh_of("one"))
    net.experts = nn.Parameter(distribute_tensor(net.experts.detach(), mesh, [Shard(0)]))
    net.mesh = mesh


def spread(net: nn.Module, kind: str) -> None:
    """Spread a module over the ranks."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind == "tensor":
        over_tensors(net, mesh_of("one"))
    elif kind == "tensor and fsdp2":
        over_tensors(net, mesh_of("two")["b"])
        fully_sharded(net, mesh_of("two")["a"])
    elif kind == "hsdp":
        fully_sharded(net, mesh_of("two"))
    elif kind == "mixed":
        fully_sharded(net, mesh_of("one"), mp_policy=bf16)
    elif kind == "offload":
        fully_sharded(net, mesh_of("one"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "bfloat16":
        fully_sharded(net.bfloat16(), mesh_of("one"))
    else:
        experts_over(net, mesh_of("b") if kind == "experts with copies" else mesh_of_experts())


def whole(parameter: Tensor) -> Tensor:
    """Return the whole gradient of a parameter; where there is none here, its part is 0."""
    gradient = parameter.grad
    gradient = torch.zeros_like(parameter) if gradient is None else gradient
    return getattr(gradient, "full_tensor", gradient.clone)().detach().clone()


def trained(kind: str, scope: str, order: float, alone: bool = False) -> Any:
    """Train a few steps; return norms, limits, gradients before and after, and placements."""
    torch.manual_seed(0)
    net: Any = Experts() if "experts" in kind else Net()
    if not alone:
        spread(net, kind)
    named = dict(net.named_parameters())
    dtype = net.dense.weight.dtype if "experts" in kind else net.up.weight.dtype
    served = {"idle experts": [2], "resting experts": [4, 2]}.get(kind, [3])
    limit = Percentile(50, window=5) if kind == "resting experts" else LIMITS[scope]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    clipper = GradientClipper(optimizer, limit, scope=scope, norm_type=order, model=net)
    rank, size = distributed.get_rank(), 8 // distributed.get_world_size()
    steps = []
    for step in range(3):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        own = slice(None) if alone else slice(size * rank, size * (rank + 1))
        chosen = torch.arange(8)[own] % served[step % len(served)]  # the rest get no token
        optimizer.zero_grad()
        net(batch[own], chosen).float().square().mean().backward()
        if "experts" in kind:
            net.add_up()
        before = {name: whole(parameter) for name, parameter in named.items()}
        optimizer.step()
        after = {name: whole(parameter) for name, parameter in named.items()}
        norms = dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True))
        steps.append((norms, clipper.last.thresholds.tolist(), before, after))
    clipper.close()
    gradients = [parameter.grad for parameter in named.values()]
    return steps, repr([getattr(gradient, "placements", gradient) for gradient in gradients])


def check(pool: Any, kind: str, scope: str, order: float) -> list[str]:
    """Compare all ranks with the oracle and with one process; return the placements of each."""
    results = pool.run(trained, kind, scope, order)
    needed, _ = pool.run(trained, kind, scope, order, True)[0]
    limit, clipped_once = LIMITS[scope], False
    for steps, _ in results:
        for step, (norms, _, before, after) in enumerate(steps):
            assert repr(norms) == repr(results[0][0][step][0])  # the same bits on all ranks
            expected, clipped = oracle(before, scope, order, limit)
            assert norms == pytest.approx(expected, rel=1e-6)
            for name, gradient in after.items():
                most, eps = clipped[name].abs().max().item(), torch.finfo(gradient.dtype).eps
                torch.testing.assert_close(
                    gradient.double(), clipped[name], rtol=2 * eps, atol=8 * eps * most
                )
            if kind not in ("mixed", "bfloat16"):
                assert norms == pytest.approx(needed[step][0], rel=1e-4, abs=1e-7)
            clipped_once |= max(norms.values()) > 1.5 * limit
    assert clipped_once
    return [placements for _, placements in results]


HERE = {
    "tensor": "Partial",
    "mixed": "Shard",
    "offload": "Shard",
    "bfloat16": "Shard",
    "experts": "Shard",
    "idle experts": "None",
}
ON_TWO_DIMENSIONS = {
    "tensor and fsdp2": "_StridedShard",
    "hsdp": "Replicate",
    "experts with copies": "Shard",
}


@pytest.mark.parametrize("order", quick([2.0, INF], 2.0))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", quick(HERE, "tensor", "experts", "mixed"))
def test_modules(ranks, kind, scope, order):
    """Modules are clipped by the norms of their whole gradients."""
    assert any(HERE[kind] in placements for placements in check(ranks, kind, scope, order))


@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", ON_TWO_DIMENSIONS)
@pytest.mark.slow
def test_meshes_of_two_dimensions(four_ranks, kind, scope, order):
    """So are modules on meshes of two dimensions."""
    for placements in check(four_ranks, kind, scope, order):
        assert ON_TWO_DIMENSIONS[kind] in placements


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_rules_where_a_rank_has_no_gradient(ranks, scope):
    """They learn the same on all ranks, and as in one process."""
    needed, _ = ranks.run(trained, "resting experts", scope, 2.0, True)[0]
    results = ranks.run(trained, "resting experts", scope, 2.0)
    for steps, _ in results:
        thresholds = [own for _, own, *_ in steps]
        assert thresholds == [pytest.approx(own[1], rel=1e-4, abs=1e-7) for own in needed]
        assert repr(thresholds) == repr([own[1] for own in results[0][0]])
