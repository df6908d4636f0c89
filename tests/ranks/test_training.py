"""Training of modules spread over ranks, against their whole gradients and one process."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks
from gradclip.thresholds import Percentile, RelativeToWeights
from tests.support.curves import steps_in
from tests.support.dtensors import (
    INF,
    SCOPES,
    check_clipped,
    mesh_of,
    norms_by_label,
    quick,
    recorded,
    spread,
    whole,
)

LIMITS = {"global": 0.1, "parameter": 0.05, "unit": 0.02}
RULES = {
    "fixed": {},
    "each parameter": {"scope": "parameter"},
    "each unit": {"scope": "unit"},
    "largest element": {"norm_type": INF},
    "skipped": {"nonfinite": "skip"},
    "erased": {"nonfinite": "zero"},
    "percentile": {"max_norm": Percentile(50, window=5), "scope": "unit"},
    "weights": {"max_norm": RelativeToWeights(0.01), "scope": "unit"},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 7)
        self.down = nn.Linear(7, 3)

    def forward(self, inputs: Tensor, _: Tensor) -> Tensor:
        return self.down(self.up(self.norm(inputs)).tanh()) + 0.5


class Experts(nn.Module):
    """Four experts, each with tokens of those ranks alone that have it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(4, 5)
        self.experts = nn.Parameter(torch.randn(4, 5, 3) / 3)
        self.mesh: Any = None

    def forward(self, inputs: Tensor, chosen: Tensor) -> Tensor:
        tokens, weights, first = self.dense(inputs).tanh(), self.experts, 0
        if self.mesh is not None:
            weights = weights.to_local()
            first = len(weights) * self.mesh.get_local_rank()
        results = 0 * tokens[:, :3]
        for expert, weight in enumerate(weights, first):
            own = (chosen == expert)[:, None]
            if own.any():
                results = torch.where(own, tokens @ weight, results)
        return results + 0.5

    def add_up(self) -> None:
        """Average the gradients of the experts as those of the rest are, over copies as well."""
        if self.mesh is None or self.experts.grad is None:
            return
        local = self.experts.grad.to_local()
        local /= distributed.get_world_size()
        if self.mesh.size() < distributed.get_world_size():
            distributed.all_reduce(local, group=mesh_of("a").get_group())


def over_tensors(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, parallel

    plan = {
        "norm": parallel.SequenceParallel(sequence_dim=0),
        "up": parallel.ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "down": parallel.RowwiseParallel(),
    }
    parallel.parallelize_module(net, mesh, plan)


def experts_over(net: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.dense, mesh=mesh_of("one"))
    net.experts = nn.Parameter(spread(net.experts.detach(), mesh, "0"))
    net.mesh = mesh


def spread_module(net: Any, kind: str) -> Any:
    """Spread a module over the ranks; return it, or its wrapper."""
    from torch.distributed import fsdp

    if kind in ("ddp", "zero"):
        return nn.parallel.DistributedDataParallel(net)
    if kind in ("fsdp", "fsdp flat"):
        options = {"use_orig_params": kind == "fsdp", "device_id": torch.device("cpu")}
        return fsdp.FullyShardedDataParallel(net, **options)
    if "experts" in kind:
        experts_over(net, mesh_of("b" if kind == "experts with copies" else "experts"))
        return net
    if "tensor" in kind:
        over_tensors(net, mesh_of("one" if kind == "tensor" else "b"))
    if kind != "tensor":
        bf16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        policy = {
            "mixed": {"mp_policy": fsdp.MixedPrecisionPolicy(**bf16)},
            "offload": {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=False)},
        }.get(kind, {})
        mesh = mesh_of({"tensor and fsdp2": "a", "hsdp": "two"}.get(kind, "one"))
        net = net.bfloat16() if kind == "bfloat16" else net
        fsdp.fully_shard(net.up, mesh=mesh, **policy)
        fsdp.fully_shard(net, mesh=mesh, **policy)
    return net


def wholes(named: dict[str, nn.Parameter], kind: str) -> dict[str, Tensor]:
    """Return the whole gradients; where there is none here, its part is 0."""
    if kind in ("fsdp", "fsdp flat"):
        return {}  # not known on any rank
    return {n: whole(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in named.items()}


def trained_kind(kind: str, options: dict[str, Any], alone: bool = False) -> Any:
    """Train a few steps, in one process or spread over the ranks, each with its part of a batch.

    Returns:
        For each step norms, thresholds, and the whole gradients before and after; outputs after
        the last step; the collectives of a step; the counters; the placements of gradients.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.manual_seed(0)
    net: Any = Experts() if "experts" in kind else Net()
    module = net if alone else spread_module(net, kind)
    model = net if kind in ("ddp", "zero") else module  # whose names have no prefix
    named = dict(model.named_parameters())
    options = {"max_norm": LIMITS[options.get("scope", "global")], **options}
    dtype = next(iter(named.values())).dtype
    if kind.startswith("fsdp") and kind != "fsdp2" and not alone:
        options["ranks"] = Ranks(module.process_group)
    optimizer: Any = torch.optim.SGD(module.parameters(), lr=0.5)
    if kind == "zero":
        optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.5)
    clipper = GradientClipper(optimizer, model=model, **options)
    rank, size = distributed.get_rank(), 8 // distributed.get_world_size()
    own = slice(None) if alone else slice(size * rank, size * (rank + 1))
    served = {"idle experts": [2], "resting experts": [4, 2]}.get(kind, [3])
    steps = []
    for step in range(4):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
        if step == 2 and "nonfinite" in options:
            batch[-1, 0] = math.nan  # on the last rank alone
        chosen = torch.arange(8) % 4 if kind == "experts with copies" else torch.arange(8) // 2
        chosen[chosen >= served[step % len(served)]] = 4  # there is none: the rest get no token
        optimizer.zero_grad()
        module(batch[own], chosen[own]).float().square().mean().backward()
        if "experts" in kind:
            net.add_up()
        before = wholes(named, kind)
        with recorded() as calls:
            optimizer.step()
        thresholds = clipper.last.thresholds.tolist()
        steps.append((norms_by_label(clipper), thresholds, before, wholes(named, kind)))
    clipper.close()
    placements = repr([getattr(p.grad, "placements", p.grad) for p in named.values()])
    probe = torch.randn(16, 4, generator=torch.Generator().manual_seed(9)).to(dtype)
    with torch.no_grad():
        outputs = module(probe, torch.arange(16) % 4)
    return steps, outputs, calls, clipper.state_dict()["counters"], placements


def check_kind(pool: Any, kind: str, options: dict[str, Any]) -> Any:
    """Compare all ranks with the oracle and with one process; return what they returned."""
    results = pool.run(trained_kind, kind, options)
    needed, outputs, _, counters, _ = pool.run(trained_kind, kind, options, True)[0]
    scope, order = options.get("scope", "global"), options.get("norm_type", 2.0)
    exact = kind not in ("mixed", "bfloat16")
    near = {"rel": 1e-4, "abs": 1e-7, "nan_ok": True}
    for index, (needed_norms, needed_thresholds, *_) in enumerate(needed):
        rows = [steps[index] for steps, *_ in results]
        norms, thresholds, before, _ = rows[0]
        assert {repr(row[:2]) for row in rows} == {repr(rows[0][:2])}  # the same bits on all ranks
        if exact:
            assert norms == pytest.approx(needed_norms, **near)
            assert thresholds == pytest.approx(needed_thresholds, **near)
        if before and "max_norm" not in options and all(map(math.isfinite, norms.values())):
            clipped = [(norms, after, None) for *_, after in rows]
            check_clipped(clipped, before, scope, order, limit=LIMITS[scope], slack=8)
    for _, own_outputs, _, own_counters, _ in results:
        if exact and "tensor" not in kind and "experts" not in kind:  # whose ranks have own parts
            torch.testing.assert_close(own_outputs, outputs, rtol=1e-3, atol=1e-5)
            assert own_counters == counters
        assert own_counters["clipped"] > 0
    return results


PLACEMENTS = {
    "tensor": "Partial",
    "experts": "Shard",
    "mixed": "Shard",
    "offload": "Shard",
    "bfloat16": "Shard",
    "idle experts": "None",
    # On meshes of two dimensions
    "tensor and fsdp2": "_StridedShard",
    "hsdp": "Replicate",
    "experts with copies": "Shard",
}
KINDS = [*PLACEMENTS]
CASES = [*product(["two_ranks"], KINDS[:6]), *product(["four_ranks"], KINDS)]


@pytest.mark.parametrize("order", quick([2.0, INF], 2.0))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("pool", "kind"), quick(CASES, *product(["two_ranks"], KINDS[:3])))
def test_modules(request, pool, kind, scope, order):
    """Modules are clipped by the norms of their whole gradients."""
    ranks = request.getfixturevalue(pool)
    results = check_kind(ranks, kind, {"scope": scope, "norm_type": order})
    assert any(PLACEMENTS[kind] in placements for *_, placements in results)


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_a_rank_without_a_gradient_now_and_then(ranks, scope):
    """Rules learn the same on all ranks, and as in one process."""
    check_kind(ranks, "resting experts", RULES["percentile"] | {"scope": scope})


WRAPPED = [*product(["zero", "fsdp", "fsdp flat"], ["skipped"])]
QUICK = [*WRAPPED, *product(["fsdp2"], ["fixed", "each unit", "skipped", "weights"])]


@pytest.mark.parametrize(
    ("kind", "name"), quick([*WRAPPED, *product(["fsdp2", "ddp"], RULES)], *QUICK)
)
def test_rules(ranks, kind, name):
    """Every rule decides as in one process, under FSDP in one collective, under DDP in none."""
    for _, _, calls, *_ in check_kind(ranks, kind, RULES[name]):
        assert kind == "zero" or calls == ["sum"] * ("fsdp" in kind)


def test_logs(two_ranks, tmp_path):
    """Of a directory that all ranks were given, rank 0 alone writes into it."""
    two_ranks.run(trained_kind, "fsdp2", {"log": str(tmp_path / "logs")})
    [file] = (tmp_path / "logs").iterdir()
    assert steps_in(file)["grad_norm/pre"] == [*range(4)]
