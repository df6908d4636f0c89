"""Ranks that have parts of one gradient, and the collective in which they tell each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from ..engines.base import INFINITY
from ..errors import AttachError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, eq=False)
class RankGroup:
    """Ranks over which gradients are spread. Told apart by identity."""

    ranks: tuple[int, ...]
    """Their global numbers, rising."""
    processes: tuple[ProcessGroup, ...]
    """One for all of them, or one for each dimension of their mesh."""
    device_types: tuple[str, ...]
    """Of the tensors that the collective takes."""

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return distributed.get_rank()

    def reduced_(self, values: Tensor, order: float) -> Tensor:
        """Return values added up over all ranks, of infinite order the largest. Collective.

        Args:
            values: Of this rank, 1-d, as many on all of them. May be written.
            order: p of the norm.

        Returns:
            The same bits on all ranks, where the values were; NaN where one of them has it.
        """
        device = self._device(values.device)
        total = values if device == values.device else values.to(device)
        if order == INFINITY:
            # Backends may take any number for larger than NaN: it is told apart.
            total = torch.cat([total.nan_to_num(nan=INFINITY, posinf=INFINITY), total.isnan()])
        # As distributed.all_reduce does, which takes as long again for questions.
        work = self._united_group().allreduce([total], _options(order == INFINITY))
        if work is not None:
            work.wait()
        if order == INFINITY:
            total, unknown = total.chunk(2)
            total = torch.where(unknown > 0, torch.nan, total)
        return total if total.device == values.device else total.to(values.device)

    def gathered(self, message: Any) -> dict[int, Any]:
        """Return what every rank tells, by its number, rising. Collective.

        Args:
            message: What this one does; it must be possible to pickle it.
        """
        if distributed.get_backend(self.processes[0]) == "fake":
            return {self.rank: message}  # nobody else is there
        found: list[Any] = [None] * len(self.ranks)
        distributed.all_gather_object(found, (self.rank, message), self._united_group())
        return dict(sorted(found, key=lambda each: each[0]))

    def _united_group(self) -> ProcessGroup:
        """Return one group for all ranks; made when all of them enter their first collective."""
        if len(self.processes) == 1:
            return self.processes[0]
        return _made_for(self.ranks, distributed.distributed_c10d._get_default_group())

    def _device(self, device: torch.device) -> torch.device:
        """Return where the collective takes tensors: where they are, if it serves that."""
        if device.type in self.device_types:
            return device
        if "cpu" in self.device_types:
            return torch.device("cpu")
        kind = self.device_types[0]
        return torch.device(kind, torch.get_device_module(kind).current_device())


@dataclass(frozen=True, slots=True)
class NormRanks:
    """The ranks that a norm spans; nothing where it is on one rank alone, or the same on all."""

    groups: tuple[RankGroup, ...] = ()
    """Those of DTensors, in the order in which their collectives are entered."""
    across: RankGroup | None = None
    """Those of all else, over which the norms of DTensors are added up as well; the last."""

    def __bool__(self) -> bool:
        return bool(self.groups) or self.across is not None

    def combined(
        self, vector_of: Callable[[RankGroup | None], Tensor], order: float, *, alone: bool
    ) -> Tensor:
        """Return what all ranks have told of each group. One collective for each of them.

        Args:
            vector_of: Returns for a group what this rank has of it, in fresh memory; for None what
                is in none of ``groups``.
            order: p of the norm: sums, or of infinite order the largest.
            alone: Whether there is anything in none of them.
        """
        found = [vector_of(None)] if alone or self.across is not None else []
        found += [group.reduced_(vector_of(group), order) for group in self.groups]
        total = found[0]
        if len(found) > 1:
            # Ranks have the groups in different places, and the same bits whatever the order.
            together = torch.stack(found).sort(0).values
            total = together.amax(0) if order == INFINITY else together.sum(0)
        return total if self.across is None else self.across.reduced_(total, order)


def norm_ranks_of(groups: Iterable[RankGroup], across: RankGroup | None = None) -> NormRanks:
    """Return the ranks that a norm spans.

    Args:
        groups: Those of DTensors.
        across: Those of all else.

    Raises:
        AttachError: What is on both cannot be counted once.
    """
    if across is None:
        return NormRanks(in_order(groups))
    outside = []
    for group in groups:
        common = {*group.ranks}.intersection(across.ranks)
        if len(common) == len(group.ranks):
            continue  # each has its part, and all are counted together
        if len(common) > 1:
            raise AttachError(
                f"DTensors lie on the ranks {[*group.ranks]}, of which ranks= has "
                f"{sorted(common)}: give it a group with all of them, or with one of them, as the "
                "mesh of the pipeline's dimension is."
            )
        outside.append(group)
    return NormRanks(in_order(outside), across)


@cache
def _made_for(ranks: tuple[int, ...], world: ProcessGroup) -> ProcessGroup:
    return distributed.new_group([*ranks], use_local_synchronization=True)  # type: ignore[no-any-return]


@cache
def _options(largest: bool) -> distributed.AllreduceOptions:
    options = distributed.AllreduceOptions()
    kind = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
    options.reduceOp = kind  # type: ignore[assignment]  # torch's own stub knows one of its types
    if hasattr(options, "asyncOp"):  # torch 2.7 and later
        options.asyncOp = False
    return options


def in_order(groups: Iterable[RankGroup]) -> tuple[RankGroup, ...]:
    """Return groups as all of their ranks enter their collectives one after the other."""
    return tuple(sorted(groups, key=lambda group: group.ranks))


def is_first() -> bool:
    """Tell whether this process is the first one, or the only one."""
    in_group = distributed.is_available() and distributed.is_initialized()
    return not in_group or distributed.get_rank() == 0
