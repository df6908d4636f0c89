"""Which norm the gradients of a parameter group belong to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import checked_bound
from .errors import AttachError

KEY = "max_norm"
"""The key of a parameter group that has a norm and a threshold of its own."""
SHARED = "global"
"""The label of all groups without the key."""
_ABSENT = object()


class GroupLabels:
    """Labels of parameter groups: one shared by most, one for each group with a ``max_norm``.

    The keys are read when a group is first seen, and kept: loading the state of an optimizer
    replaces its groups.

    Args:
        optimizers: The optimizers, in the order in which their groups are counted.

    Raises:
        ArgumentError: A key that is no number >= 0 and not None.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._kept: list[list[Any]] = [[] for _ in optimizers]
        self._warned: set[tuple[int, int, str]] = set()
        self.names: tuple[str, ...] = ()
        """The k labels, in the order of the norms."""
        self.limits: tuple[float | None, ...] = ()
        """For each label the threshold of its group; None where the clipper's threshold rules."""
        self.indices: list[list[int | None]] = [[] for _ in optimizers]
        """For each optimizer and group the index of its label; None where it is never clipped."""
        self.single = True
        """Whether all gradients share one norm, as they do without keys."""
        self.refresh()
        if not self.names:  # every group is left out: a norm of nothing
            self.names, self.limits = (SHARED,), (None,)

    def refresh(self) -> None:
        """Label the groups that were added since.

        Raises:
            ArgumentError: One of them has a key that is no number >= 0 and not None.
            AttachError: Groups were taken away, so that it is not known whose keys are kept.
        """
        for number, optimizer in enumerate(self._optimizers):
            groups, kept = optimizer.param_groups, self._kept[number]
            if len(groups) < len(kept):
                self._forget(number, len(groups))
            while len(kept) < len(groups):
                key = groups[len(kept)].get(KEY, _ABSENT)
                if key is not _ABSENT and key is not None:
                    name = self._name(number, len(kept))
                    key = checked_bound(f"The {KEY} of {name}", key, none="never to clip it")
                self.indices[number].append(self._label(number, len(kept), key))
                kept.append(key)
                self.single = self.single and key is _ABSENT
            self.warn_of_lost_keys(optimizer)

    @property
    def shared(self) -> slice:
        """The place of the norm that the clipper's own threshold rules; empty without one."""
        at = self.names.index(SHARED) if SHARED in self.names else len(self.names)
        return slice(at, at + 1)

    def thresholds(self, ruled: Tensor) -> Tensor:
        """Put what the clipper's threshold rules among the thresholds of groups.

        Args:
            ruled: Shape (0,) or (1,).

        Returns:
            Shape (k,), of the same device and dtype.
        """
        if len(self.names) == ruled.numel():
            return ruled
        limits = _limits(self.limits, ruled.device, ruled.dtype)
        at = self.shared
        return torch.cat([limits[: at.start], ruled, limits[at.start + ruled.numel() :]])

    def warn_of_lost_keys(self, optimizer: Optimizer) -> None:
        """Warn, once for each, of keys that are no longer what they were when they were read."""
        groups = optimizer.param_groups
        number = self._optimizers.index(optimizer)
        for index, (group, kept) in enumerate(zip(groups, self._kept[number], strict=False)):
            found = group.get(KEY, _ABSENT)
            if found is kept or found == kept:
                continue
            seen = (number, index, repr(found))
            if seen not in self._warned:
                self._warned.add(seen)
                warnings.warn(
                    f"{self._name(number, index)} was attached with {_said(kept)} and now has "
                    f"{_said(found)}, as after loading a checkpoint without it: the clipper keeps "
                    "the first. To change it, detach() and attach a new clipper.",
                    UserWarning,
                    stacklevel=3,
                )

    def _forget(self, number: int, groups: int) -> None:
        if not self.single:
            raise AttachError(
                f"{type(self._optimizers[number]).__name__} had {len(self._kept[number])} "
                f"parameter groups and has {groups}: which {KEY} belongs to which cannot be known. "
                "detach() and attach a new clipper."
            )
        del self._kept[number][groups:], self.indices[number][groups:]

    def _label(self, number: int, group: int, key: Any) -> int | None:
        if key is None:
            return None
        name = SHARED if key is _ABSENT else self._name(number, group)
        if name not in self.names:
            self.names = (*self.names, name)
            self.limits = (*self.limits, None if key is _ABSENT else key)
        return self.names.index(name)

    def _name(self, number: int, group: int) -> str:
        several = f"optimizer {number}, " if len(self._optimizers) > 1 else ""
        return f"{several}group {group}"


@lru_cache(maxsize=8)
def _limits(limits: tuple[float | None, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    known = [math.inf if limit is None else limit for limit in limits]
    return torch.tensor(known, dtype=dtype, device=device)


def _said(key: Any) -> str:
    return f"no {KEY}" if key is _ABSENT else f"{KEY}={key!r}"
