"""DTensors: over which ranks one is spread, and what of it is here and counts here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from .groups import RankGroup, in_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


# One call into C for all tensors costs less than a line of Python for each.
_SPEC, _MESH = attrgetter("_spec"), attrgetter("_spec.mesh")
LOCAL = attrgetter("_local_tensor")
"""The memory of a DTensor that is here."""
WHOLE = {Tensor, nn.Parameter}
"""Types of tensors that lie on one rank."""
_GROUPS: dict[tuple[tuple[int, ...], ProcessGroup | None], RankGroup] = {}
"""By ranks and the group of all processes: meshes of the same ranks share a group."""
MOST_KNOWN = 8
_COMMON: dict[tuple[int, ...], tuple[Shard | None, tuple[object, ...]]] = {}
"""By the ids of descriptions what is common, with them, so that their ids stay theirs."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What this rank has of a gradient. Told apart by identity."""

    group: RankGroup
    counts: bool
    """Whether it is counted here: of copies one is."""
    rows: Tensor | None
    """Which indices of dimension 0 are here; None for all."""


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Tell whether a tensor is a DTensor, which lies on several ranks."""
    # Importing torch.distributed.tensor takes half a second; who has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mesh_ranks(tensor: Tensor) -> tuple[int, ...]:
    """Return the ranks over which a tensor lies; empty for one that is no DTensor."""
    return _ranks_of(tensor.device_mesh) if is_dtensor(tensor) else ()


def groups_of(tensors: Iterable[Tensor]) -> tuple[RankGroup, ...]:
    """Return the groups of ranks over which some of the tensors lie."""
    listed = [*tensors]
    kinds = {*map(type, listed)}
    if kinds <= WHOLE:
        return ()
    if len(kinds) > 1 or not is_dtensor(listed[0]):
        listed = [tensor for tensor in listed if is_dtensor(tensor)]
    meshes = {id(mesh): mesh for mesh in map(_MESH, listed)}  # to hash a mesh takes microseconds
    # Of meshes of the same ranks the first one's group is used, on all ranks the same.
    ordered = sorted(meshes.values(), key=_names_of) if len(meshes) > 1 else meshes.values()
    found = {group for mesh in ordered if (group := _group_of(mesh, _world())) is not None}
    return in_order(found)


def is_elsewhere(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor on other ranks alone."""
    return is_dtensor(tensor) and tensor.device_mesh.get_coordinate() is None


def shard_of(tensor: DTensor) -> Shard | None:
    """Return what this rank has of a tensor; None where it is not in its mesh."""
    mesh = tensor.device_mesh
    return _shard_of(mesh, _world(), tuple(tensor.placements), tuple(tensor.shape))


def common_shard_of(tensors: Sequence[DTensor]) -> Shard | None:
    """Return the group of ranks of tensors and whether they count, if it is the same for all.

    None where it is not, or a sum is pending. What was found is known by the descriptions of the
    tensors, which FSDP2 keeps from step to step.
    """
    specs = (*map(_SPEC, tensors),)
    key = (*map(id, specs),)
    known = _COMMON.get(key)
    if known is None:
        while len(_COMMON) >= MOST_KNOWN:
            del _COMMON[next(iter(_COMMON))]
        known = _COMMON[key] = _common_shard(tensors), specs
    return known[0]


def _common_shard(tensors: Sequence[DTensor]) -> Shard | None:
    shards = [shard_of(tensor) for tensor in tensors]
    kinds = {None if shard is None else (shard.group, shard.counts) for shard in shards}
    if len(kinds) > 1 or shards[0] is None or any(map(is_pending, tensors)):
        return None
    return shards[0]


def local_of(tensor: DTensor) -> Tensor:
    """Return the part of a tensor that is here, to be measured.

    Where it is still to be added up over ranks, as `Partial` says, that is done: collective.
    """
    if is_pending(tensor):
        tensor = tensor.redistribute(placements=_whole(tensor.placements))
    return stored(tensor)


def is_pending(tensor: DTensor) -> bool:
    """Tell whether a tensor is still to be added up over ranks."""
    return any(placement.is_partial() for placement in tensor.placements)


def stored(tensor: DTensor) -> Tensor:
    """Return the memory that is here, to be written."""
    local = tensor.to_local()
    wait = getattr(local, "wait", None)  # of a collective that is under way
    found: Tensor = local if wait is None else wait()
    return found


def _whole(placements: Sequence[Placement]) -> list[Placement]:
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in placements]


def _world() -> ProcessGroup | None:
    """Return the group of all processes, which tells its meshes from equal ones of an earlier."""
    found: ProcessGroup | None = torch.distributed.group.WORLD
    return found


@cache
def _names_of(mesh: DeviceMesh) -> list[str]:
    if mesh.get_coordinate() is None:
        return []
    return [mesh.get_group(dimension).group_name for dimension in range(mesh.ndim)]


@cache
def _ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


@cache
def _group_of(mesh: DeviceMesh, world: ProcessGroup | None) -> RankGroup | None:
    if mesh.get_coordinate() is None:
        return None
    ranks = _ranks_of(mesh)
    processes = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))
    if mesh.ndim > 1 and world is not None and len(ranks) == world.size():
        processes = (world,)
    return _GROUPS.setdefault((ranks, world), RankGroup(ranks, processes, (mesh.device_type,)))


@lru_cache(maxsize=1 << 16)
def _shard_of(
    mesh: DeviceMesh,
    world: ProcessGroup | None,
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
) -> Shard | None:
    group, coordinate = _group_of(mesh, world), mesh.get_coordinate()
    if group is None or coordinate is None:
        return None
    counts, rows = True, None
    # Where a dimension of the mesh was sharded after a later one, as by FSDP2 on tensor parallel,
    # its placement is strided.
    dimensions = sorted(
        range(mesh.ndim), key=lambda each: -each if _is_strided(placements[each]) else -mesh.ndim
    )
    for dimension in dimensions:
        place, placement = coordinate[dimension], placements[dimension]
        if not hasattr(placement, "dim"):  # a copy, or a part of a sum
            counts = counts and place == 0
        elif shape and placement.dim % len(shape) == 0:
            rows = torch.arange(shape[0], device="cpu") if rows is None else rows
            parts = rows.chunk(mesh.size(dimension)) if len(rows) else ()
            rows = parts[place] if place < len(parts) else rows[:0]
    return Shard(group, counts, rows)


def _is_strided(placement: Placement) -> bool:
    return hasattr(placement, "split_factor")
