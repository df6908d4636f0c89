"""Shares a GradScaler's overflow among ranks, so that all of them skip a step or none does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from ..engines.base import INFINITY
from ..errors import AttachError
from ..ranks.groups import RankGroup
from .call_stack import running_scaler


class SharedOverflow:
    """Makes an overflow on one rank an overflow on all of them, for some optimizers. Collective.

    GradScaler has no hooks: until the last `release` its class is replaced by a derived one, in
    which several clippers may share the overflows of their own optimizers.

    Args:
        scaler: The GradScaler.
        optimizers: The optimizers; overflows of others stay on their rank.
        group: The ranks.
        device: The device of the overflow on a rank that has no gradient.

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
        if not isinstance(scaler, _SharingScaler):
            scaler.__class__ = _sharing_class(type(scaler))
        sharing = cast("_SharingScaler", scaler)
        sharing.shared_overflows.update(dict.fromkeys(optimizers, self))

    def serves(self, scaler: GradScaler) -> bool:
        """Return whether it shares the overflows of this scaler."""
        return self._scaler() is scaler

    def release(self) -> None:
        """Leave the scaler, the last one with its own class; the second call does nothing."""
        scaler: object = self._scaler()
        if not isinstance(scaler, _SharingScaler):
            return
        for optimizer in [reference() for reference in self._optimizers]:
            # It may be shared through another clipper by now.
            if optimizer is not None and scaler.shared_overflows.get(optimizer) is self:
                del scaler.shared_overflows[optimizer]
        if not scaler.shared_overflows:
            scaler.__class__ = _original_class(scaler)

    def prepare(self, scaler: GradScaler) -> None:
        """Make the scale on a rank that has scaled no loss, as most stages of a pipeline."""
        if scaler._scale is None:
            scaler._lazy_init_scale_growth_tracker(self._device)

    def share(self, found_inf: dict[torch.device, Tensor]) -> None:
        """Replace the values of this rank by the largest of all ranks, in place. Collective.

        Args:
            found_inf: By device a 0-d tensor, above 0 for an overflow.
        """
        if not found_inf:  # there is no gradient on this rank
            found_inf[self._device] = torch.zeros((), device=self._device)
        device = next(iter(found_inf))
        here = torch.stack([value.to(device) for value in found_inf.values()]).amax(0, keepdim=True)
        [anywhere] = self._group.reduced_(here, INFINITY)
        for value in found_inf.values():
            value.copy_(anywhere)


class _SharingScaler:
    """The methods in which a GradScaler looks for overflows, sharing them with other ranks."""

    shared_overflows: WeakKeyDictionary[Optimizer, SharedOverflow]
    """By optimizer. On the class, one for each scaler, since the scaler's own attributes are saved
    and copied with it."""

    def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        shared = self._shared_overflow_of(optimizer)
        if shared is not None:
            shared.prepare(self)
        return super().step(optimizer, *args, **kwargs)  # type: ignore[misc]

    def unscale_(self, optimizer: Optimizer) -> None:
        """Unscale the gradients; for an optimizer that does not unscale by itself."""
        self._look_and_share("unscale_", optimizer)

    def _check_inf_per_device(self, optimizer: Optimizer) -> Any:
        """Look for an overflow alone; for an optimizer that unscales by itself."""
        return self._look_and_share("_check_inf_per_device", optimizer)

    def _look_and_share(self: Any, method: str, optimizer: Optimizer) -> Any:
        shared = self._shared_overflow_of(optimizer)
        if shared is not None:
            shared.prepare(self)
        result = getattr(super(), method)(optimizer)
        if shared is not None:
            shared.share(self._per_optimizer_states[id(optimizer)]["found_inf_per_device"])
        return result

    def _shared_overflow_of(self: Any, optimizer: Optimizer) -> SharedOverflow | None:
        return self.shared_overflows.get(optimizer) if self.is_enabled() else None

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """Make copies of the scaler's original class: they share nothing."""
        return object.__new__, (_original_class(self),), self.__getstate__()


def _sharing_class(kind: type[GradScaler]) -> type[GradScaler]:
    namespace: dict[str, Any] = {"shared_overflows": WeakKeyDictionary()}
    return type(kind.__name__, (_SharingScaler, kind), namespace)


def _original_class(scaler: _SharingScaler) -> Any:
    return type(scaler).__mro__[2]  # after the derived class and _SharingScaler


def refuse_unshared_overflow(shared: SharedOverflow | None) -> None:
    """Refuse a running GradScaler that may skip a step on one rank alone.

    Args:
        shared: The overflows of the scaler that the clipper was given, if any.

    Raises:
        AttachError: The scaler does not share its overflows with other ranks.
    """
    scaler = running_scaler()
    if scaler is None or not scaler.is_enabled() or (shared is not None and shared.serves(scaler)):
        return
    # FSDP's own scaler shares its overflows already.
    module = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    if module is None or not isinstance(scaler, module.ShardedGradScaler):
        raise AttachError(
            "GradScaler may skip this step on one rank while the others wait for it: give the "
            "clipper this very one as grad_scaler=, through which the ranks agree, beside ranks=."
        )
