"""The rank group of a DTensor, and its shard on this rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..engines.base import TensorList
from .groups import NormRanks, RankGroup, in_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


# One call into C for all tensors costs less than a line of Python for each.
_SPEC, _MESH = attrgetter("_spec"), attrgetter("_spec.mesh")
LOCAL = attrgetter("_local_tensor")
"""The local memory of a DTensor."""
LOCAL_TYPES = {Tensor, nn.Parameter}
"""Types of tensors that are on one rank. A subclass may be a DTensor, and is asked."""

# Caches that live as long as the process: the room's docstring says why they may.
_GROUPS: dict[tuple[tuple[int, ...], ProcessGroup | None], RankGroup] = {}
"""By ranks and the group of all processes: meshes of the same ranks share one rank group, and so
one collective a step."""
_COMMON_SHARDS: dict[tuple[int, ...], tuple[Shard | None, tuple[object, ...]]] = {}
"""By the ids of DTensorSpecs, with these, which keeps their ids from being used again."""
MOST_COMMON_SHARDS = 8
"""Lists of DTensors that are remembered: one for each optimizer or call in a training loop."""


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The part of a DTensor on this rank. Compared by identity."""

    group: RankGroup
    counts: bool
    """True if its power sum is counted here: of replicas one is."""
    rows: Tensor | None
    """Indices of dimension 0 that are on this rank; None for all."""


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    # Importing torch.distributed.tensor takes half a second; who has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def mesh_ranks(tensor: Tensor) -> tuple[int, ...]:
    """Return the ranks of a DTensor's mesh, rising; empty for another tensor."""
    return _ranks_of(tensor.device_mesh) if is_dtensor(tensor) else ()


def groups_of(tensors: Iterable[Tensor]) -> tuple[RankGroup, ...]:
    """Return the rank groups of the DTensors among tensors, in the order of their collectives."""
    listed = [*tensors]
    kinds = {*map(type, listed)}
    if kinds <= LOCAL_TYPES:
        return ()
    if len(kinds) > 1 or not is_dtensor(listed[0]):
        listed = [tensor for tensor in listed if is_dtensor(tensor)]
    meshes = {id(mesh): mesh for mesh in map(_MESH, listed)}  # to hash a mesh takes microseconds
    facts = [_facts_of(mesh, _world()) for mesh in meshes.values()]
    # Meshes of the same ranks share the group of the first. The first by the names of their
    # process groups, which are the same on all ranks; the order of parameters may not be.
    facts.sort(key=lambda known: known.names)
    groups = {_group_of(known, _world()) for known in facts if known.process_groups}
    return in_order(groups)


def is_elsewhere(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor on other ranks alone."""
    return is_dtensor(tensor) and tensor.device_mesh.get_coordinate() is None


def shard_of(tensor: DTensor) -> Shard | None:
    """Return the shard of a DTensor on this rank; None if its mesh does not include the rank."""
    mesh = tensor.device_mesh
    return _shard_of(mesh, _world(), tuple(tensor.placements), tuple(tensor.shape))


def common_shard_of(tensors: Sequence[DTensor]) -> Shard | None:
    """Return a shard with the group and the ``counts`` of all tensors, if these are the same.

    None if they differ, or if a sum is pending. Remembered by the specs of the tensors, which
    FSDP2 keeps from step to step: so the usual step asks no tensor by itself.
    """
    specs = (*map(_SPEC, tensors),)
    key = (*map(id, specs),)
    remembered = _COMMON_SHARDS.get(key)
    if remembered is None:
        while len(_COMMON_SHARDS) >= MOST_COMMON_SHARDS:
            del _COMMON_SHARDS[next(iter(_COMMON_SHARDS))]
        remembered = _COMMON_SHARDS[key] = _common_shard(tensors), specs
    return remembered[0]


class Parts(NamedTuple):
    """The memory on this rank of gradients whose sums one collective adds up."""

    tensors: TensorList
    group: RankGroup
    """The ranks of the collective."""
    counts: bool
    """True if this rank counts the gradients, False if another rank counts their copies."""


def parts_in(norm_ranks: NormRanks, gradients: TensorList) -> Parts | None:
    """Return the parts of gradients on this rank.

    None if the gradients are of several kinds, or no single collective serves them.

    Args:
        norm_ranks: The ranks that their norm spans.
        gradients: What parameters hold, None for no gradient. Not written.
    """
    group = norm_ranks.only_group
    if group is None or len({*map(type, gradients)}) != 1:
        return None
    if not is_dtensor(gradients[0]):
        return None if norm_ranks.across is None else Parts(gradients, group, counts=True)
    shard = common_shard_of(gradients)  # type: ignore[arg-type]
    if shard is None:
        return None
    return Parts(TensorList(map(LOCAL, gradients)), group, shard.counts)


def _common_shard(tensors: Sequence[DTensor]) -> Shard | None:
    shards = [shard_of(tensor) for tensor in tensors]
    kinds = {None if shard is None else (shard.group, shard.counts) for shard in shards}
    if len(kinds) > 1 or shards[0] is None or any(map(is_pending, tensors)):
        return None
    return shards[0]


def local_of(tensor: DTensor) -> Tensor:
    """Return the local part of a DTensor, to be measured. Collective if a sum is pending."""
    if is_pending(tensor):
        tensor = tensor.redistribute(placements=_whole(tensor.placements))
    return stored(tensor)


def is_pending(tensor: DTensor) -> bool:
    """Return whether ranks hold summands of a DTensor (`Partial`), not parts of it."""
    return any(placement.is_partial() for placement in tensor.placements)


def stored(tensor: DTensor) -> Tensor:
    """Return the local memory of a DTensor, to be written."""
    local = tensor.to_local()
    wait = getattr(local, "wait", None)  # for a collective that is under way
    memory: Tensor = local if wait is None else wait()
    return memory


def _whole(placements: Sequence[Placement]) -> list[Placement]:
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in placements]


def _world() -> ProcessGroup | None:
    """Return the process group of all ranks; None without one."""
    world: ProcessGroup | None = torch.distributed.group.WORLD
    return world


class _MeshFacts(NamedTuple):
    """The facts of a mesh that a step asks for."""

    ranks: tuple[int, ...]
    process_groups: tuple[ProcessGroup, ...]
    """One for each dimension; none if the mesh does not include this rank."""
    names: tuple[str, ...]
    """Names of the process groups."""
    device_type: str


@cache
def _facts_of(mesh: DeviceMesh, world: ProcessGroup | None) -> _MeshFacts:
    inside = mesh.get_coordinate() is not None
    groups = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim if inside else 0))
    names = tuple(group.group_name for group in groups)
    return _MeshFacts(_ranks_of(mesh), groups, names, mesh.device_type)


def _ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    with _disable_current_modes():  # a FakeTensorMode refuses the mesh, which has values
        return tuple(sorted(mesh.mesh.flatten().tolist()))


def _group_of(mesh: _MeshFacts, world: ProcessGroup | None) -> RankGroup:
    group = _GROUPS.get((mesh.ranks, world))
    if group is None:
        process_groups = mesh.process_groups
        if len(process_groups) > 1 and world is not None and len(mesh.ranks) == world.size():
            process_groups = (world,)
        group = RankGroup(mesh.ranks, process_groups, (mesh.device_type,))
        _GROUPS[mesh.ranks, world] = group
    return group


@lru_cache(maxsize=1 << 16)
def _shard_of(
    mesh: DeviceMesh,
    world: ProcessGroup | None,
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
) -> Shard | None:
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    counts, rows = True, None
    # FSDP2 on tensor parallelism shards by an outer dimension of the mesh what an inner one has
    # sharded before. Such a placement is strided; the strided ones come last, inner ones first.
    dimensions = sorted(
        range(mesh.ndim), key=lambda d: -d if _is_strided(placements[d]) else -mesh.ndim
    )
    for dimension in dimensions:
        place, placement = coordinate[dimension], placements[dimension]
        if not hasattr(placement, "dim"):  # a replica, or a summand: the first one counts
            counts = counts and place == 0
        elif shape and placement.dim % len(shape) == 0:
            rows = torch.arange(shape[0], device="cpu") if rows is None else rows
            # As torch.chunk cuts, which may make fewer chunks than there are ranks.
            chunks = rows.chunk(mesh.size(dimension)) if len(rows) else ()
            rows = chunks[place] if place < len(chunks) else rows[:0]
    return Shard(_group_of(_facts_of(mesh, world), world), counts, rows)


def _is_strided(placement: Placement) -> bool:
    return hasattr(placement, "split_factor")
