"""Which ranks a gradient is spread over, what of it counts here, and the collective."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .engines.base import INFINITY

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


# One call into C for all tensors costs less than a line of Python for each.
_SPEC, _MESH = attrgetter("_spec"), attrgetter("_spec.mesh")
LOCAL = attrgetter("_local_tensor")
"""The memory of a DTensor that is here."""
MOST_KNOWN = 8
_COMMON: dict[tuple[int, ...], tuple[Share | None, tuple[object, ...]]] = {}
"""By the ids of descriptions what is common, with them, so that their ids stay theirs."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks over which gradients are spread."""

    ranks: tuple[int, ...]
    """Their global numbers, rising."""
    processes: tuple[ProcessGroup | None, ...]
    """One for all of them, or one for each dimension of their mesh."""
    device_type: str
    """Of the tensors that the collective takes."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Group) and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)

    def reduced(self, sums: Tensor, order: float) -> Tensor:
        """Return sums over all ranks, of infinite order the largest. Collective; same everywhere.

        Args:
            sums: Of this rank, of one shape on all of them. Not written.
            order: p of the norm.
        """
        from torch import distributed

        kind = distributed.ReduceOp.MAX if order == INFINITY else distributed.ReduceOp.SUM
        device = self._device(sums.device)
        total = sums.clone() if sums.device == device else sums.to(device)
        for processes in self.processes:
            distributed.all_reduce(total, kind, processes)
        return total.to(sums.device)

    def _device(self, device: torch.device) -> torch.device:
        """Return where the collective takes tensors: where they are, if it serves that."""
        if device.type == self.device_type or self.device_type == "cpu":
            return device if device.type == self.device_type else torch.device("cpu")
        return torch.device(self.device_type, torch.get_device_module(device).current_device())


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What this rank has of a gradient. Told apart by identity."""

    group: Group
    counts: bool
    """Whether it is counted here: of copies one is."""
    rows: Tensor | None
    """Which indices of dimension 0 are here; None for all."""


def is_first() -> bool:
    """Tell whether this process is the first one, or the only one."""
    distributed = torch.distributed
    in_group = distributed.is_available() and distributed.is_initialized()
    return not in_group or distributed.get_rank() == 0


def is_spread(tensor: object) -> TypeGuard[DTensor]:
    """Tell whether a tensor is a DTensor, which lies on several ranks."""
    # Importing torch.distributed.tensor takes half a second; who has a DTensor has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def groups_of(tensors: Iterable[Tensor]) -> tuple[Group, ...]:
    """Return the groups of ranks over which some of the tensors lie, in an order of their own."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return ()
    spread = [tensor for tensor in tensors if isinstance(tensor, module.DTensor)]
    meshes = {id(mesh): mesh for mesh in map(_MESH, spread)}  # to hash a mesh takes microseconds
    found = {group for mesh in meshes.values() if (group := _group_of(mesh, _world())) is not None}
    return tuple(sorted(found, key=lambda group: group.ranks))


def share_of(tensor: DTensor) -> Share | None:
    """Return what this rank has of a tensor; None where it is not in its mesh."""
    mesh = tensor.device_mesh
    return _share_of(mesh, _world(), tuple(tensor.placements), tuple(tensor.shape))


def common_share_of(tensors: Sequence[DTensor]) -> Share | None:
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
        known = _COMMON[key] = _in_common(tensors), specs
    return known[0]


def _in_common(tensors: Sequence[DTensor]) -> Share | None:
    shares = [share_of(tensor) for tensor in tensors]
    kinds = {None if share is None else (share.group, share.counts) for share in shares}
    if len(kinds) > 1 or shares[0] is None or any(map(is_pending, tensors)):
        return None
    return shares[0]


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
def _group_of(mesh: DeviceMesh, world: ProcessGroup | None) -> Group | None:
    if mesh.get_coordinate() is None:
        return None
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    processes: tuple[ProcessGroup | None, ...]
    if mesh.ndim > 1 and len(ranks) == torch.distributed.get_world_size():
        processes = (world,)
    else:
        processes = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim))
    return Group(ranks, processes, mesh.device_type)


@lru_cache(maxsize=1 << 16)
def _share_of(
    mesh: DeviceMesh,
    world: ProcessGroup | None,
    placements: tuple[Placement, ...],
    shape: tuple[int, ...],
) -> Share | None:
    group, coordinate = _group_of(mesh, world), mesh.get_coordinate()
    if group is None or coordinate is None:
        return None
    counts, rows = True, None
    for dimension, (place, placement) in enumerate(zip(coordinate, placements, strict=True)):
        if not hasattr(placement, "dim"):  # a copy, or a part of a sum
            counts = counts and place == 0
        elif shape and placement.dim % len(shape) == 0:
            rows = torch.arange(shape[0], device="cpu") if rows is None else rows
            parts, _ = placement._split_tensor(  # type: ignore[attr-defined]
                rows, mesh.size(dimension), with_padding=False, contiguous=True
            )
            rows = parts[place]
    return Share(group, counts, rows)
