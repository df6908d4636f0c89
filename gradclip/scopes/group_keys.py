"""The ``max_norm`` keys of parameter groups, as they were when the groups were first seen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from ..checks import checked_bound
from ..errors import AttachError
from .naming import group_name

KEY = "max_norm"
"""The key of a parameter group that has a norm and a threshold of its own."""
ABSENT = object()
"""What stands for the key of a group without it."""


class GroupKeys:
    """Reads the keys when a group is first seen, and keeps them.

    Loading the state of an optimizer replaces its groups, and with them the keys.

    Args:
        optimizers: The optimizers, in the order in which they are counted.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._kept: list[list[Any]] = [[] for _ in optimizers]
        self._warned: set[tuple[int, int, str]] = set()

    @property
    def given(self) -> bool:
        """Whether any group has a key."""
        return any(key is not ABSENT for kept in self._kept for key in kept)

    def of(self, optimizer: int, group: int) -> Any:
        """Return the key of a group: a number, None for never clipped, or `ABSENT`."""
        return self._kept[optimizer][group]

    def refresh(self, *, numbered: bool) -> None:
        """Read the keys of groups that were added, and warn of keys that were changed.

        Args:
            numbered: Whether the numbers of the groups matter otherwise, too.

        Raises:
            ArgumentError: One of them has a key that is no number >= 0 and not None.
            AttachError: Groups were taken away, so that it is not known which are left.
        """
        for number, optimizer in enumerate(self._optimizers):
            groups, kept = optimizer.param_groups, self._kept[number]
            if len(groups) < len(kept):
                self._forget(number, len(groups), numbered=numbered)
            while len(kept) < len(groups):
                key = groups[len(kept)].get(KEY, ABSENT)
                if key is not ABSENT and key is not None:
                    name = group_name(self._optimizers, number, len(kept))
                    key = checked_bound(f"The {KEY} of {name}", key, none="never to clip it")
                kept.append(key)
            self.warn_of_lost_keys(optimizer)

    def warn_of_lost_keys(self, optimizer: Optimizer) -> None:
        """Warn, once for each, of keys that are no longer what they were when they were read."""
        groups = optimizer.param_groups
        number = self._optimizers.index(optimizer)
        for index, (group, kept) in enumerate(zip(groups, self._kept[number], strict=False)):
            found = group.get(KEY, ABSENT)
            if found is kept or found == kept:
                continue
            seen = (number, index, repr(found))
            if seen not in self._warned:
                self._warned.add(seen)
                warnings.warn(
                    f"{group_name(self._optimizers, number, index)} was attached with "
                    f"{_said(kept)} and now has {_said(found)}, as after loading a checkpoint "
                    "without it: the clipper keeps the first. To change it, detach() and attach a "
                    "new clipper.",
                    UserWarning,
                    stacklevel=3,
                )

    def _forget(self, number: int, groups: int, *, numbered: bool) -> None:
        if numbered or self.given:
            raise AttachError(
                f"{type(self._optimizers[number]).__name__} had {len(self._kept[number])} "
                f"parameter groups and has {groups}: which of them are left cannot be known. "
                "detach() and attach a new clipper."
            )
        del self._kept[number][groups:]


def _said(key: Any) -> str:
    return f"no {KEY}" if key is ABSENT else f"{KEY}={key!r}"
