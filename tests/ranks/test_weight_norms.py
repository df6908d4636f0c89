"""The norms of parameters that are spread over ranks, and of their changes, against the whole."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, MemorySink, Ranks
from tests.support.dtensors import full_gradients, mesh_of, recorded, spread, whole
from tests.support.reference import norms_and_ratios

INF = math.inf
STEPS = 3


def spread_parameters(words: str) -> dict[str, nn.Parameter]:
    """Return parameters over all ranks, of shards or copies, with gradients of the same kind."""
    named = {}
    for name, values in full_gradients("float32").items():
        named[name] = nn.Parameter(spread(values, "one", words))
        named[name].grad = spread(values * 0.5 + 1, "one", words)
    return named


def staged_parameters(copy: str) -> dict[str, nn.Parameter]:
    """Return every second parameter, as a stage of a pipeline has them, and one that all have."""
    named = {}
    for index, (name, values) in enumerate(full_gradients("float32").items()):
        if name == copy or index % distributed.get_world_size() == distributed.get_rank():
            named[name] = nn.Parameter(values.clone())
            named[name].grad = values * 0.5 + 1
    return named


def logged_here(kind: str, order: float, writers: int) -> Any:
    """Train and return, of each step, the whole parameters before and what the sink keeps.

    Args:
        kind: How the parameters are spread, and by how many optimizers.
        order: p of the norms.
        writers: The ranks below this number have a sink.
    """
    words, _, count = kind.partition(", ")
    copy = "row" if "copy" in words else ""
    named = staged_parameters(copy) if "stages" in words else spread_parameters(words)
    halves = [[*named.items()][part :: int(count)] for part in range(int(count))]
    optimizers = [torch.optim.SGD(half, lr=0.1, momentum=0.9) for half in halves]
    sink = MemorySink(weights_every=2)
    options: dict[str, Any] = {"ranks": Ranks(replicated=copy or ())} if "stages" in words else {}
    log = sink if distributed.get_rank() < writers else None
    snapshots: list[dict[str, Tensor]] = []
    calls: list[list[str]] = []
    with GradientClipper(optimizers, 1.0, log=log, norm_type=order, **options) as clipper:
        for _ in range(STEPS):
            snapshots.append({name: whole(p.data) for name, p in named.items()})
            with recorded() as entered:
                clipper.step()
            calls.append(entered)
            for parameter in named.values():
                parameter.grad = parameter.grad.clone()
        snapshots.append({name: whole(p.data) for name, p in named.items()})
    return snapshots, [(each.weight_norms, each.update_ratios) for each in sink.steps], calls


KINDS = ("0, 1", "1, 1", "R, 1", "0, 2", "stages, 1", "stages copy, 1")


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_the_whole(two_ranks, kind, order, writers):
    """The sink of one rank makes all of them measure, at its steps alone."""
    results = two_ranks.run(logged_here, kind, order, writers)
    snapshots = [dict[str, Tensor]() for _ in range(STEPS + 1)]
    for own, _, _ in results:
        for snapshot, part in zip(snapshots, own, strict=True):
            snapshot.update(part)
    for _, logged, _ in results[:writers]:
        assert len(logged) == STEPS
        assert logged[1] == (None, None)
        for step in (0, 2):
            norms, ratios = norms_and_ratios(snapshots[step], snapshots[step + 1], order)
            assert logged[step][0] == pytest.approx(norms, rel=1e-6)
            assert logged[step][1] == pytest.approx(ratios, rel=1e-5)
    optimizers = int(kind[-1])
    for _, _, calls in results:
        assert [*map(len, calls)] == [1 + 2 * optimizers, 1, 1 + 2 * optimizers]


def trained_by_fsdp() -> Any:
    """Train a module that FSDP2 shards; return the whole parameters before and what is logged."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh_of("one"))
    optimizer, sink = torch.optim.AdamW(model.parameters(), lr=0.1), MemorySink(weights_every=2)
    snapshots = []
    with GradientClipper(optimizer, 1.0, model=model, log=sink):
        for step in range(STEPS):
            snapshots.append({name: whole(p.data) for name, p in model.named_parameters()})
            batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()
        snapshots.append({name: whole(p.data) for name, p in model.named_parameters()})
    return snapshots, [(each.weight_norms, each.update_ratios) for each in sink.steps]


def test_a_module_that_is_sharded(two_ranks):
    """FSDP2 gathers the parameters for each pass, and shards them before the step."""
    for snapshots, logged in two_ranks.run(trained_by_fsdp):
        for step in (0, 2):
            norms, ratios = norms_and_ratios(snapshots[step], snapshots[step + 1])
            assert logged[step][0] == pytest.approx(norms, rel=1e-6)
            assert logged[step][1] == pytest.approx(ratios, rel=1e-5)
