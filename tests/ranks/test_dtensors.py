"""Gradients that are DTensors, against those of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from gradclip import GradientClipper
from gradclip.thresholds import RelativeToWeights
from tests.support.dtensors import (
    INF,
    LIMIT,
    SCOPES,
    Recorded,
    full_gradients,
    mesh_of,
    oracle,
    placements_of,
    quick,
    spread,
    spread_alone,
)

WEIGHT = torch.arange(1.0, 13.0).reshape(4, 3)


def clip_spread(mesh: Any, words: Any, scope: str, order: float, dtype: torch.dtype) -> Any:
    """Clip gradients spread by these words; return norms, whole gradients, collectives."""
    parameters = {}
    for name, gradient in full_gradients(dtype).items():
        own = mesh_of(mesh if isinstance(mesh, str) else mesh[name])
        word = words if isinstance(words, str) else words[name]
        weight = spread(torch.zeros_like(gradient), own, placements_of(word.replace("P", "R")))
        parameters[name] = nn.Parameter(weight)
        parameters[name].grad = spread(gradient, own, placements_of(word))
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, norm_type=order)
    with Recorded() as calls:
        optimizer.step()
    clipped = {name: p.grad.full_tensor().double() for name, p in parameters.items()}
    return clipper.last.norms.tolist(), clipped, calls


def check_dtensors(
    pool: Any, mesh: Any, words: Any, scope: str, order: float = 2.0, dtype: Any = torch.float32
) -> list[Any]:
    """Compare all ranks with the oracle; return the collectives of each."""
    results = pool.run(clip_spread, mesh, words, scope, order, dtype)
    needed, clipped = oracle(full_gradients(dtype), scope, order, LIMIT)
    rounding = torch.finfo(dtype).eps
    for norms, gradients, _ in results:
        assert norms == results[0][0]  # the same bits on all ranks
        assert norms == pytest.approx([*needed.values()], rel=1e-6)
        for name, gradient in clipped.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=2 * rounding, atol=1e-30)
    return [calls for _, _, calls in results]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", quick([1.0, 2.0, 3.0, INF], 2.0, INF))
@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_one_mesh(ranks, scope, order, words):
    """Shards and replicas have the norms of the whole, in one collective."""
    for calls in check_dtensors(ranks, "one", words, scope, order):
        assert calls == ["allreduce"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("words", ["0 0", "0 1", "1 0", "R 0", "0 R", "R R"])
@pytest.mark.slow
def test_a_mesh_of_two_dimensions(four_ranks, scope, words):
    """One collective serves both dimensions of a mesh of all ranks."""
    for calls in check_dtensors(four_ranks, "two", words, scope):
        assert calls == ["allreduce"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_dtypes(two_ranks, scope, dtype):
    """Shards of every dtype have the norms of the whole."""
    check_dtensors(two_ranks, "one", "0", scope, dtype=dtype)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
def test_pending_sums(ranks, scope, order):
    """A gradient whose ranks hold summands is measured as their sum."""
    words = {"matrix": "P", "row": "0", "vector": "R", "filters": "1"}
    check_dtensors(ranks, "one", words, scope, order)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.slow
def test_several_meshes(four_ranks, scope, order):
    """One collective for each group, as for experts on a mesh of their own, with replicas."""
    mesh = {"matrix": "one", "row": "two", "vector": "a", "filters": "b"}
    words = {"matrix": "0", "row": "R 1", "vector": "0", "filters": "1"}
    for calls in check_dtensors(four_ranks, mesh, words, scope, order):
        assert calls == ["allreduce"] * 3


def weighed(scope: str) -> Any:
    """Clip by the norms of the weights where rank 0 alone has a gradient."""
    weight = nn.Parameter(spread(WEIGHT, mesh_of("one"), placements_of("0")))
    optimizer = torch.optim.SGD([("weight", weight)], lr=0.0)
    clipper = GradientClipper(optimizer, RelativeToWeights(0.5), scope=scope)
    if mesh_of("one").get_local_rank() == 0:
        weight.grad = spread_alone(torch.ones(4, 3), mesh_of("one"), placements_of("0"))
    optimizer.step()
    return clipper.last.thresholds.tolist()


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_weights_without_gradients(ranks, scope):
    """The norm of a weight is that of the whole, also where a rank has no gradient."""
    rows = WEIGHT if scope == "unit" else WEIGHT.reshape(1, -1)
    needed = [norm / 2 for norm in torch.linalg.vector_norm(rows, dim=1).tolist()]
    for thresholds in ranks.run(weighed, scope):
        assert thresholds == pytest.approx(needed)


@cache
def stages() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stages", "replicas", "shards"))


def on_half_of_the_ranks(order: float) -> Any:
    """Clip in stages of two dimensions each: one replica, and shards."""
    mesh = stages()["replicas", "shards"]
    weight = nn.Parameter(spread(torch.zeros(4), mesh, placements_of("R 0")))
    weight.grad = spread(torch.arange(4.0), mesh, placements_of("R 0"))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, None, norm_type=order)
    optimizer.step()
    with Recorded() as calls:
        optimizer.step()
    return clipper.last.norm.item(), calls


@pytest.mark.slow
@pytest.mark.parametrize(("order", "norm"), [(2.0, 14**0.5), (INF, 3.0)])
def test_a_mesh_of_some_ranks(four_ranks, order, norm):
    """A mesh of two dimensions that is not the world takes one collective, in a group made once."""
    for result in four_ranks.run(on_half_of_the_ranks, order):
        assert result == (pytest.approx(norm), ["allreduce"])
