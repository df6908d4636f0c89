"""Modules that average gradients over processes in the backward pass, and whether they did.

A parameter does not know the DistributedDataParallel or the FSDP2 module that averages its
gradient, nor do these have hooks that say whether a backward pass was to average.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..errors import AttachError
from .groups import in_process_group


class AveragingModules:
    """The modules that average the gradients of some parameters.

    They are searched for once, among all objects of the process, and only in a process group.

    Args:
        parameters: The parameters.

    Raises:
        AttachError: A parameter is one of FSDP1, whose gradients cannot be taken apart.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._replicas: WeakSet[Any] = WeakSet()
        self._shards: WeakSet[Any] = WeakSet()
        if not in_process_group():
            return
        listed = [*parameters]
        if any(getattr(parameter, "_fsdp_flattened", False) for parameter in listed):
            raise AttachError(
                "FullyShardedDataParallel accumulates gradients in memory of its own, so that "
                "those of one micro-batch are nowhere by themselves: use fully_shard (FSDP2), or "
                "clip at the step alone."
            )
        ids = {*map(id, listed)}
        module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param_group")
        shard_kind: Any = () if module is None else module.FSDPParamGroup
        for each in gc.get_objects():
            kind = type(each)  # not isinstance, which asks proxies for their __class__
            if issubclass(kind, DistributedDataParallel):
                self._replicas.update([each] if _are_among(ids, each.parameters()) else [])
            elif issubclass(kind, shard_kind):
                shards = (held.sharded_param for held in each.fsdp_params)
                self._shards.update([each] if _are_among(ids, shards) else [])

    @property
    def replicate(self) -> bool:
        """True if DistributedDataParallel averages gradients, after their hooks."""
        return bool(self._replicas)

    @property
    def overwrite_gradients(self) -> bool:
        """True if a backward pass writes into the memory of the gradients of an earlier one."""
        return any(module.gradient_as_bucket_view for module in self._replicas)

    @property
    def skipped_average(self) -> bool:
        """True if the last forward pass was in ``no_sync()``: gradients are those of this rank."""
        # What the forward pass has noted: no_sync() may be over when the backward pass is.
        return not all(module.require_forward_param_sync for module in self._replicas)

    def refuse_hidden(self) -> None:
        """Refuse FSDP2 modules that keep the gradients of a backward pass to themselves.

        Raises:
            AttachError: Their gradients are not to be averaged.
        """
        if not all(group.reduce_grads and group.all_reduce_grads for group in self._shards):
            raise AttachError(
                "FSDP2 keeps the gradients of this backward pass to itself, as "
                "set_requires_gradient_sync(False) or set_requires_all_reduce(False) says, so that "
                "those of a micro-batch cannot be clipped: leave both on in micro_batch()."
            )


def _are_among(ids: set[int], parameters: Iterable[Tensor]) -> bool:
    """Return whether some parameters are among those with the given ids."""
    return not ids.isdisjoint(map(id, parameters))
