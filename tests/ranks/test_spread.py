"""Gradients that are spread over ranks, against those of one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, clip_grad_norm_, get_total_norm

INF = math.inf
SHAPES = {"matrix": (7, 6), "row": (1, 5), "vector": (6,), "filters": (4, 3, 2)}
LIMIT = 0.7


def meshes() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    world = distributed.get_world_size()
    found = {"one": init_device_mesh("cpu", (world,), mesh_dim_names=("a",))}
    if world == 4:
        found["two"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return found


_meshes: dict[str, Any] = {}


def mesh_of(name: str) -> Any:
    """Return a mesh, made once in each process."""
    if not _meshes:
        _meshes.update(meshes())
    if name in ("a", "b"):
        return _meshes["two"][name]
    return _meshes[name]


def placements_of(words: str) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = {"R": Replicate(), "P": Partial(), "0": Shard(0), "1": Shard(1)}
    return [kinds[word] for word in words.split()]


def full_gradients(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def spread(full: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """Spread a tensor; of a sum that is pending each rank has another part."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    fits = [
        Replicate()
        if placement.is_partial() or placement.is_shard(1) and full.dim() < 2
        else placement
        for placement in placements
    ]
    tensor = distribute_tensor(full, mesh, fits)
    if not any(placement.is_partial() for placement in placements):
        return tensor
    local, given = tensor.to_local(), []
    for dimension, (placement, fit) in enumerate(zip(placements, fits, strict=True)):
        given.append(placement if placement.is_partial() else fit)
        if placement.is_partial():
            # Parts that differ by rank and add up to the whole, exactly.
            count, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            local = local * (2 if place == 0 else 0 if place < count - 1 else -1)
    return DTensor.from_local(local, mesh, given, run_check=False)


class Recorded:
    """Counts the collectives that are entered."""

    def __enter__(self) -> list[str]:
        self._real = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}
        calls: list[str] = []

        def counted(name: str, real: Any) -> Any:
            return lambda *args, **kwargs: (calls.append(name), real(*args, **kwargs))[1]

        for name, real in self._real.items():
            setattr(distributed, name, counted(name, real))
        return calls

    def __exit__(self, *error: object) -> None:
        for name, real in self._real.items():
            setattr(distributed, name, real)


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
@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("words", ["0", "1", "R"])
def test_shards_have_the_norms_of_the_whole_in_one_collective(ranks, scope, order, words):
    for calls in check(ranks, "one", words, scope, order, torch.float32):
        assert calls == ["all_reduce"]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("words", ["0 0", "0 1", "1 0", "R 0", "0 R", "R R"])
def test_shards_on_a_mesh_of_two_dimensions(four_ranks, scope, words):
    for calls in check(four_ranks, "two", words, scope, 2.0, torch.float32):
        assert calls == ["all_reduce"]


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
def test_several_meshes_in_one_model_take_a_collective_for_each_group(four_ranks, scope, order):
    """As expert parallel on a mesh of its own, of which there are copies."""
    mesh = {"matrix": "one", "row": "two", "vector": "a", "filters": "b"}
    words = {"matrix": "0", "row": "R 1", "vector": "0", "filters": "1"}
    for calls in check(four_ranks, mesh, words, scope, order, torch.float32):
        assert calls == ["all_reduce"] * 3
