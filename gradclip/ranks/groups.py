"""Groups of ranks that hold parts of one gradient, and the collective that adds up their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..engines.base import CPU, INFINITY
from ..errors import AttachError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FEW = 4000
"""Most numbers of all ranks together that every rank gets; more are added up on the way."""


# Compared by identity: a group is part of the key of a bucket, at every step.
@dataclass(frozen=True, slots=True, eq=False)
class RankGroup:
    """Ranks over which gradients are spread. Compared by identity."""

    ranks: tuple[int, ...]
    """Their global ranks, rising."""
    process_groups: tuple[ProcessGroup, ...]
    """One for all of them, or one for each dimension of their mesh."""
    device_types: tuple[str, ...]
    """Types of the devices that its collectives serve."""

    @property
    def rank(self) -> int:
        """The global rank of this process."""
        return distributed.get_rank()

    def reduced_(self, values: Tensor, order: float) -> Tensor:
        """Return the sums over all ranks, or for the infinity norm the maxima. Collective.

        Args:
            values: The values of this rank, 1-d, of the same length on all. May be written.
            order: p of the norm.

        Returns:
            The same bits on all ranks, on the device of ``values``; NaN where a rank has NaN.
        """
        device, group = self._device(values.device), self._united_group()
        total = values if device == values.device else values.to(device)
        ranks = len(self.ranks)
        if ranks < total.numel() <= FEW // ranks and device == CPU and _is_gloo(group):
            return _sum_of_gathered(group, total, ranks, order).to(values.device)
        if order == INFINITY:
            # Of NaN and a number, a backend may take either for the maximum: NaN travels apart.
            total = torch.cat([total.nan_to_num(nan=INFINITY, posinf=INFINITY), total.isnan()])
        # What distributed.all_reduce ends in; its checks take as long again.
        work = group.allreduce([total], _options(order == INFINITY))
        if work is not None:
            work.wait()
        if order == INFINITY:
            total, is_nan = total.chunk(2)
            total = torch.where(is_nan > 0, torch.nan, total)
        return total if total.device == values.device else total.to(values.device)

    def gathered(self, message: Any) -> dict[int, Any]:
        """Return the messages of all ranks by rank, rising. Collective.

        Args:
            message: The message of this rank; it must be possible to pickle it.
        """
        if distributed.get_backend(self.process_groups[0]) == "fake":
            return {self.rank: message}  # torch's backend for tests and estimates: no other rank
        messages: list[Any] = [None] * len(self.ranks)
        distributed.all_gather_object(messages, (self.rank, message), self._united_group())
        return dict(sorted(messages, key=lambda pair: pair[0]))

    def _united_group(self) -> ProcessGroup:
        """Return one process group of all ranks."""
        if len(self.process_groups) == 1:
            return self.process_groups[0]
        return _made_for(self.ranks, distributed.distributed_c10d._get_default_group())

    def _device(self, device: torch.device) -> torch.device:
        """Return the device for the collective: that of the values, if the backend serves it."""
        if device.type in self.device_types:
            return device
        if "cpu" in self.device_types:
            return torch.device("cpu")
        kind = self.device_types[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())


@dataclass(frozen=True, slots=True)
class NormRanks:
    """The ranks that a norm spans; false if it is that of one rank, or the same on all."""

    groups: tuple[RankGroup, ...] = ()
    """Groups that DTensors are spread over, in the order of their collectives."""
    across: RankGroup | None = None
    """The group of the ``ranks=`` option. Its collective comes last, and adds up all."""
    only_group: RankGroup | None = field(init=False)
    """The group of the one collective of a step; None if there is none, or several."""

    def __post_init__(self) -> None:
        groups = self.groups if self.across is None else (*self.groups, self.across)
        object.__setattr__(self, "only_group", groups[0] if len(groups) == 1 else None)

    def __bool__(self) -> bool:
        return bool(self.groups) or self.across is not None

    @property
    def widest(self) -> RankGroup | None:
        """The largest of ``groups``, whose collective carries what a rank has of its own.

        None if there are no such groups: then it is the last collective.
        """
        return max(self.groups, key=lambda group: len(group.ranks), default=None)

    def combined(
        self, vector_of: Callable[[RankGroup | None], Tensor], order: float, *, alone: bool
    ) -> Tensor:
        """Return the power sums of all ranks. One collective for each group.

        Args:
            vector_of: Returns the sums of this rank for the gradients of a group, in fresh memory;
                for None the sums of the gradients in none of ``groups``.
            order: p of the norm: sums are added; for infinity the maximum is taken.
            alone: Whether there are gradients in none of ``groups``.
        """
        vectors = [vector_of(None)] if alone or self.across is not None else []
        vectors += [group.reduced_(vector_of(group), order) for group in self.groups]
        total = vectors[0]
        if len(vectors) > 1:
            # Floats do not add up alike in every order, and ranks order their groups differently:
            # sorted, the sum has the same bits on all.
            together = torch.stack(vectors).sort(0).values
            total = together.amax(0) if order == INFINITY else together.sum(0)
        return total if self.across is None else self.across.reduced_(total, order)


def norm_ranks_of(groups: Iterable[RankGroup], across: RankGroup | None = None) -> NormRanks:
    """Return the ranks that a norm spans.

    Args:
        groups: Groups that DTensors are spread over.
        across: The group of the ``ranks=`` option.

    Raises:
        AttachError: Some ranks of a DTensor are in ``across``, so that it cannot count once.
    """
    if across is None:
        return NormRanks(in_order(groups))
    outside = []
    for group in groups:
        common = {*group.ranks}.intersection(across.ranks)
        if len(common) == len(group.ranks):
            continue  # each rank has its shard, and `across` adds up all of them
        if len(common) > 1:
            raise AttachError(
                f"DTensors lie on the ranks {[*group.ranks]}, of which the group in ranks= has "
                f"{sorted(common)}: give it a group with all of them, or with one of them, as the "
                "mesh of the pipeline's dimension is."
            )
        outside.append(group)
    return NormRanks(in_order(outside), across)


def in_order(groups: Iterable[RankGroup]) -> tuple[RankGroup, ...]:
    """Return groups in the one order in which all ranks enter their collectives."""
    return tuple(sorted(groups, key=lambda group: group.ranks))


def is_first() -> bool:
    """Return whether this process is rank 0, or not distributed."""
    return not in_process_group() or distributed.get_rank() == 0


def in_process_group() -> bool:
    """Return whether this process has joined the process group of torch.distributed."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Return the number of all ranks; 1 without a process group."""
    return distributed.get_world_size() if in_process_group() else 1


def _is_gloo(group: ProcessGroup) -> bool:
    """Return whether gloo serves the tensors on the CPU of a group that serves such tensors."""
    return group._get_backend(CPU).name() == "gloo"


def _sum_of_gathered(group: ProcessGroup, values: Tensor, ranks: int, order: float) -> Tensor:
    """Return what `RankGroup.reduced_` does, added up on each rank.

    Gloo splits an all-reduce into a part for each rank, and each part travels twice. Of few numbers
    it is faster to send all to all ranks.
    """
    gathered = [torch.empty_like(values) for _ in range(ranks)]
    work = group.allgather([gathered], [values])
    if work is not None:
        work.wait()
    total, *others = gathered
    for other in others:  # in one order on all ranks
        total = torch.maximum(total, other) if order == INFINITY else total.add_(other)
    return total


@cache  # one of the caches that the room's docstring explains
def _made_for(ranks: tuple[int, ...], world: ProcessGroup) -> ProcessGroup:
    """Make a process group for ranks, when all of them enter their first collective."""
    return distributed.new_group([*ranks], use_local_synchronization=True)  # type: ignore[no-any-return]


@cache
def _options(largest: bool) -> distributed.AllreduceOptions:
    options = distributed.AllreduceOptions()
    kind = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
    options.reduceOp = kind  # type: ignore[assignment]  # torch's own stub knows one of its types
    if hasattr(options, "asyncOp"):  # torch 2.7 and later
        options.asyncOp = False
    return options
