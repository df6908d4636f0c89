"""Gradients that are spread over ranks, and the collectives that are entered."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

INF = math.inf
SHAPES = {"matrix": (7, 6), "row": (1, 5), "vector": (6,), "filters": (4, 3, 2)}
LIMIT = 0.7


def quick(values: Iterable[Any], *some: Any) -> list[Any]:
    """Return the values of a parameter, of which all but some make slow tests."""
    return [
        value if value in some else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


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
        if placement.is_partial() or (placement.is_shard(1) and full.dim() < 2)
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
    return DTensor.from_local(
        local, mesh, given, run_check=False, shape=full.shape, stride=full.stride()
    )


def spread_alone(full: Tensor, mesh: Any, placements: list[Any]) -> Tensor:
    """Spread a tensor that every rank has, without telling the others."""
    from torch.distributed.tensor import DTensor

    local = full
    for dimension, placement in enumerate(placements):
        if placement.is_shard():
            parts = local.chunk(mesh.size(dimension), placement.dim)
            place = mesh.get_local_rank(dimension)
            local = parts[place] if place < len(parts) else local.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


class Recorded:
    """Names the collectives that are entered, when they are over."""

    def __enter__(self) -> list[str]:
        from torch.distributed.tensor.debug import CommDebugMode

        self._mode, self._calls = CommDebugMode(), []
        self._mode.__enter__()
        return self._calls

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for kind, count in self._mode.get_comm_counts().items():
            self._calls += [str(kind).rpartition(".")[2].strip("_")] * count
