"""The ``max_norm`` entries of parameter groups, read once and then kept."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import methodcaller
from typing import Any

from torch.optim import Optimizer

from ..checks import checked_bound
from ..errors import AttachError
from .naming import group_name

KEY = "max_norm"
"""The key of a parameter group with a norm and a threshold of its own."""
ABSENT = object()
"""Stands for the key of a group without it: None is a value of the key."""
_KEY_OF = methodcaller("get", KEY, ABSENT)


class GroupKeys:
    """Reads the keys of parameter groups once, and keeps them.

    Loading the state of an optimizer replaces its groups, and with them the keys: a checkpoint
    from before a key was set would silently drop it.

    Args:
        optimizers: The optimizers, in the order in which they are numbered.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._keys: list[list[Any]] = [[] for _ in optimizers]
        self._warned: set[tuple[int, int, str]] = set()

    @property
    def given(self) -> bool:
        """True if any group has a key."""
        return any(key is not ABSENT for keys in self._keys for key in keys)

    def of(self, optimizer: int, group: int) -> Any:
        """Return the key of a group: a number, None for never clipped, or `ABSENT`."""
        return self._keys[optimizer][group]

    def refresh(self, *, numbered: bool) -> None:
        """Read the keys of groups that were added, and warn of keys that have changed.

        Args:
            numbered: True if labels contain the numbers of groups.

        Raises:
            ArgumentError: A group that was added has a key that is neither a number >= 0 nor None.
            AttachError: Groups were removed, so that keys or numbers no longer match the others.
        """
        for number, optimizer in enumerate(self._optimizers):
            groups, keys = optimizer.param_groups, self._keys[number]
            if [*map(_KEY_OF, groups)] == keys:
                continue  # the usual case, without a line of Python for each group
            if len(groups) < len(keys):
                self._forget(number, len(groups), numbered=numbered)
            while len(keys) < len(groups):
                key = groups[len(keys)].get(KEY, ABSENT)
                if key is not ABSENT and key is not None:
                    name = group_name(self._optimizers, number, len(keys))
                    key = checked_bound(f"The {KEY} of {name}", key, none="never to clip it")
                keys.append(key)
            self.warn_of_lost_keys(optimizer)

    def warn_of_lost_keys(self, optimizer: Optimizer) -> None:
        """Warn, once for each change, of keys that are no longer what they were when read."""
        number = self._optimizers.index(optimizer)
        pairs = zip(optimizer.param_groups, self._keys[number], strict=False)
        for index, (group, kept) in enumerate(pairs):
            key = group.get(KEY, ABSENT)
            if key is kept or key == kept:
                continue
            change = (number, index, repr(key))
            if change not in self._warned:
                self._warned.add(change)
                warnings.warn(
                    f"{group_name(self._optimizers, number, index)} was attached with "
                    f"{_shown(kept)} and now has {_shown(key)}, as after loading a checkpoint "
                    "without it: the clipper keeps the first. To change it, detach() and attach a "
                    "new clipper.",
                    UserWarning,
                    stacklevel=3,
                )

    def _forget(self, number: int, count: int, *, numbered: bool) -> None:
        if numbered or self.given:
            raise AttachError(
                f"{type(self._optimizers[number]).__name__} had {len(self._keys[number])} "
                f"parameter groups and has {count}, and nothing says which were removed: detach() "
                "and attach a new clipper."
            )
        del self._keys[number][count:]


def _shown(key: Any) -> str:
    return f"no {KEY}" if key is ABSENT else f"{KEY}={key!r}"
