"""Gradients that are spread over ranks, against those of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradclip import GradientClipper
from gradclip.thresholds import RelativeToWeights
from tests.support.dtensors import (
    INF,
    LIMIT,
    SHAPES,
    Recorded,
    full_gradients,
    mesh_of,
    placements_of,
    quick,
    spread,
    spread_alone,
)

WEIGHT = torch.arange(1.0, 13.0).reshape(4, 3)


def labels_of(scope: str, name: str, shape: tuple[int, ...]) -> list[str]:
    if scope == "unit" and len(shape) > 1:
        return [f"{name}[{index}]" for index in range(shape[0])]
    return [{"global": "global"}.get(scope, name)]


def oracle(
    full: dict[str, Tensor], scope: str, order: float, limit: float
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the norms and the clipped gradients, in float64 and by hand."""
    parts: dict[str, list[Tensor]] = {}
    for name, gradient in full.items():
        labels = labels_of(scope, name, tuple(gradient.shape))
        rows = gradient.double() if len(labels) > 1 else gradient.double().unsqueeze(0)
        for label, row in zip(labels, rows, strict=True):
            parts.setdefault(label, []).append(row.flatten())
    norms = {
        label: torch.linalg.vector_norm(torch.cat(rows), order).item()
        for label, rows in parts.items()
    }
    clipped = {}
    for name, gradient in full.items():
        labels = labels_of(scope, name, tuple(gradient.shape))
        each = [min(1.0, limit / norms[label]) for label in labels]
        factors = torch.tensor(each, dtype=torch.float64)
        shape = (-1, *[1] * (gradient.dim() - 1)) if len(labels) > 1 else ()
        clipped[name] = gradient.double() * factors.reshape(shape)
    return [*norms.values()], clipped


def clip_spread(
    mesh: str | dict[str, str], words: dict[str, str], scope: str, order: float, dtype: torch.dtype
) -> Any:
    """Clip gradients that are spread as said; return norms, gradients, collectives."""
    full = full_gradients(dtype)
    parameters = {}
    for name, gradient in full.items():
        own = mesh_of(mesh if isinstance(mesh, str) else mesh[name])
        tensor = spread(
            torch.zeros_like(gradient), own, placements_of(words[name].replace("P", "R"))
        )
        parameters[name] = nn.Parameter(tensor)
        parameters[name].grad = spread(gradient, own, placements_of(words[name]))
    optimizer = torch.optim.SGD([*parameters.items()], lr=0.0)
    clipper = GradientClipper(optimizer, LIMIT, scope=scope, norm_type=order)
    with Recorded() as calls:
        optimizer.step()
    clipped = {name: p.grad.full_tensor().double() for name, p in parameters.items()}
    return clipper.last.norms.tolist(), clipped, calls


def check(pool: Any, mesh: Any, words: Any, scope: str, order: float, dtype: Any) -> list[Any]:
    words = words if isinstance(words, dict) else dict.fromkeys(SHAPES, words)
    found = pool.run(clip_spread, mesh, words, scope, order, dtype)
    norms, clipped = oracle(full_gradients(dtype), scope, order, LIMIT)
    rounding = torch.finfo(dtype).eps
    for own_norms, own_clipped, _ in found:
        assert own_norms == found[0][0]  # the same bits on all ranks
        assert own_norms == pytest.approx(norms, rel=1e-6)
        for name, gradient in clipped.items():
            torch.testing.assert_close(own_clipped[name], gradient, rtol=2 * rounding, atol=1e-30)
    return [calls for _, _, calls in found]


SCOPES = ("global", "parameter", "unit")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", quick([1.0, 2.0, 3.0, INF], 2.0, INF))
@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_shards_have_the_norms_of_the_whole_in_one_collective(ranks, scope, order, words):
    for calls in check(ranks, "one", words, scope, order, torch.float32):
        assert calls == ["allreduce"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("words", ["0 0", "0 1", "1 0", "R 0", "0 R", "R R"])
@pytest.mark.slow
def test_shards_on_a_mesh_of_two_dimensions(four_ranks, scope, words):
    for calls in check(four_ranks, "two", words, scope, 2.0, torch.float32):
        assert calls == ["allreduce"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scope", SCOPES)
def test_shards_of_every_dtype(two_ranks, scope, dtype):
    check(two_ranks, "one", "0", scope, 2.0, dtype)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
def test_sums_that_are_pending_are_measured_as_what_they_add_up_to(ranks, scope, order):
    words = {"matrix": "P", "row": "0", "vector": "R", "filters": "1"}
    check(ranks, "one", words, scope, order, torch.float32)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.slow
def test_several_meshes_in_one_model_take_a_collective_for_each_group(four_ranks, scope, order):
    """As expert parallel on a mesh of its own, of which there are copies."""
    mesh = {"matrix": "one", "row": "two", "vector": "a", "filters": "b"}
    words = {"matrix": "0", "row": "R 1", "vector": "0", "filters": "1"}
    for calls in check(four_ranks, mesh, words, scope, order, torch.float32):
        assert calls == ["allreduce"] * 3


def weighed(scope: str) -> Any:
    """Clip by the norms of the weights where the first rank alone has a gradient."""
    weight = nn.Parameter(spread(WEIGHT, mesh_of("one"), placements_of("0")))
    optimizer = torch.optim.SGD([("weight", weight)], lr=0.0)
    clipper = GradientClipper(optimizer, RelativeToWeights(0.5), scope=scope)
    if mesh_of("one").get_local_rank() == 0:
        weight.grad = spread_alone(torch.ones(4, 3), mesh_of("one"), placements_of("0"))
    optimizer.step()
    return clipper.last.thresholds.tolist()


@pytest.mark.parametrize("scope", ["parameter", "unit"])
def test_weights_count_whole_also_where_a_rank_has_no_gradient(ranks, scope):
    rows = WEIGHT if scope == "unit" else WEIGHT.reshape(1, -1)
    needed = [norm / 2 for norm in torch.linalg.vector_norm(rows, dim=1).tolist()]
    for found in ranks.run(weighed, scope):
        assert found == pytest.approx(needed)


def on_three_meshes(seed: int) -> float:
    full, mesh = full_gradients(torch.float32, seed), {"matrix": "one", "row": "a", "vector": None}
    parameters = []
    for name, own in mesh.items():
        parameter = nn.Parameter(torch.zeros_like(full[name]))
        parameter.grad = full[name]
        if own is not None:
            parameter = nn.Parameter(spread(parameter.data, mesh_of(own), placements_of("0")))
            parameter.grad = spread(full[name], mesh_of(own), placements_of("0"))
        parameters.append(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    return clipper.last.norm.item()


@pytest.mark.slow
def test_sums_of_several_groups_have_the_same_bits_on_all_ranks(four_ranks):
    for seed in range(20):
        found = four_ranks.run(on_three_meshes, seed)
        assert len({*found}) == 1


def on_half_of_the_ranks(order: float) -> Any:
    """Stages of two dimensions each: replicas, of which there is one, and shards."""
    mesh = stages()["replicas", "shards"]
    weight = nn.Parameter(spread(torch.zeros(4), mesh, placements_of("R 0")))
    weight.grad = spread(torch.arange(4.0), mesh, placements_of("R 0"))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    clipper = GradientClipper(optimizer, None, norm_type=order)
    optimizer.step()
    with Recorded() as calls:
        optimizer.step()
    return clipper.last.norm.item(), calls


@cache
def stages() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stages", "replicas", "shards"))


@pytest.mark.slow
@pytest.mark.parametrize(("order", "norm"), [(2.0, 14**0.5), (INF, 3.0)])
def test_a_mesh_of_two_dimensions_that_is_not_the_world_takes_one_collective(
    four_ranks, order, norm
):
    for found in four_ranks.run(on_half_of_the_ranks, order):
        assert found == (pytest.approx(norm), ["allreduce"])
