"""A GradScaler whose overflow on one rank is one on all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..engines.base import INFINITY
from ..errors import AttachError
from ..ranks.groups import RankGroup
from .call_stack import running_scaler

_SHARED: WeakKeyDictionary[GradScaler, WeakKeyDictionary[Optimizer, SharedOverflow]] = (
    WeakKeyDictionary()
)
"""By scaler and optimizer what agrees on the overflows of both."""


class SharedOverflow:
    """Lets a GradScaler leave out the steps of optimizers on all ranks or on none. Collective.

    GradScaler has no hooks: until the last `release` it is of a class of its own.

    Args:
        scaler: The GradScaler.
        optimizers: The optimizers; what it finds for others is their own affair.
        group: The ranks.
        device: Where the gradients of a rank are that has none.

    Raises:
        AttachError: Methods of the scaler were replaced on the object.
    """

    def __init__(
        self,
        scaler: GradScaler,
        optimizers: Sequence[Optimizer],
        group: RankGroup,
        device: torch.device,
    ) -> None:
        replaced = sorted({"unscale_", "_check_inf_per_device"} & {*vars(scaler)})
        if replaced:
            raise AttachError(
                f"{', '.join(replaced)} of the GradScaler was replaced on the object, so that "
                "ranks cannot agree on what it finds: derive a class from GradScaler instead."
            )
        self._scaler = ref(scaler)
        self._optimizers = [*map(ref, optimizers)]
        self._group = group
        self._device = device
        if scaler not in _SHARED:
            scaler.__class__ = _sharing_class(type(scaler))
        _SHARED.setdefault(scaler, WeakKeyDictionary()).update(dict.fromkeys(optimizers, self))

    def serves(self, scaler: GradScaler) -> bool:
        """Tell whether it is this scaler that ranks agree on."""
        return self._scaler() is scaler

    def release(self) -> None:
        """Give the scaler its own class back; the second call does nothing."""
        scaler = self._scaler()
        if scaler is None or scaler not in _SHARED:
            return
        for optimizer in [each() for each in self._optimizers]:
            if optimizer is not None:
                _SHARED[scaler].pop(optimizer, None)
        if not _SHARED[scaler]:
            del _SHARED[scaler]
            scaler.__class__ = type(scaler).__mro__[2]

    def prepare(self, scaler: GradScaler) -> None:
        """Make the scale on a rank that has scaled no loss, as most stages of a pipeline."""
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(self._device)

    def share(self, found: dict[torch.device, Tensor]) -> None:
        """Take over what other ranks have found, 0 or more by device, in place."""
        if not found:  # without a gradient
            found[self._device] = torch.zeros((), device=self._device)
        device = next(iter(found))
        here = torch.stack([each.to(device) for each in found.values()]).amax(0, keepdim=True)
        [anywhere] = self._group.reduced_(here, INFINITY)
        for each in found.values():
            each.copy_(anywhere)


class _SharingScaler:
    """What a GradScaler does more: for some optimizers, the ranks agree on what it finds."""

    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        shared = _shared_overflow_of(self, optimizer)
        if shared is not None:
            shared.prepare(self)
        return super().step(optimizer, *args, **kwargs)  # type: ignore[misc]

    def unscale_(self, optimizer: Optimizer) -> None:
        self._with_shared("unscale_", optimizer)

    def _check_inf_per_device(self, optimizer: Optimizer) -> Any:
        return self._with_shared("_check_inf_per_device", optimizer)

    def _with_shared(self: Any, name: str, optimizer: Optimizer) -> Any:
        shared = _shared_overflow_of(self, optimizer)
        if shared is not None:
            shared.prepare(self)
        result = getattr(super(), name)(optimizer)
        if shared is not None:
            shared.share(self._per_optimizer_states[id(optimizer)]["found_inf_per_device"])
        return result

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Let copies be of the scaler's own class: they agree with nobody."""
        return object.__new__, (type(self).__mro__[2],), self.__getstate__()


def _shared_overflow_of(scaler: GradScaler, optimizer: Optimizer) -> SharedOverflow | None:
    ours = scaler in _SHARED and scaler.is_enabled()
    return _SHARED[scaler].get(optimizer) if ours else None


def _sharing_class(kind: type[GradScaler]) -> type[GradScaler]:
    return type(kind.__name__, (_SharingScaler, kind), {})


def refuse_unshared_overflow(shared: SharedOverflow | None) -> None:
    """Refuse a GradScaler that may leave out a step on one rank alone.

    Args:
        shared: That of the scaler that the clipper was given.

    Raises:
        AttachError: It is running, and does not agree with other ranks.
    """
    scaler = running_scaler()
    if scaler is None or not scaler.is_enabled() or (shared is not None and shared.serves(scaler)):
        return
    module = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    if module is None or not isinstance(scaler, module.ShardedGradScaler):
        raise AttachError(
            "GradScaler may leave out this step on one rank while the others wait for it: give the "
            "clipper this very one as grad_scaler=, through which the ranks agree, beside ranks=."
        )
