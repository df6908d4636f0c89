"""Prefixes of the tags of several sinks on one directory: ``grad_norm``, ``grad_norm_2``, ...

A training that begins again, in a cell or a script that is run once more, takes the prefix of the
one before, whose clipper may still be there, and replaces its curves. Whether a training goes on
shows in its steps alone: it is over if it took some, and none since the other clipper was attached.
"""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from .tags import TOTAL


class PrefixClaim:
    """The claim of one sink to a prefix in a directory; it ends with the sink.

    The first sink of a directory has its prefix at once. The others get one when they first write,
    as only then is it known which of the earlier trainings go on.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._count_steps: Callable[[], int] = int
        self._has_begun = False
        self._counts_before: WeakKeyDictionary[PrefixClaim, int] = WeakKeyDictionary()
        """For each other claim its number of steps when the clipper of this one was attached."""
        self._others = _claims[directory]
        self._name: str | None = None
        """None before it has one; "" if another claim took it, until it writes again."""
        if not self._others:
            self._take(TOTAL)
        self._others.add(self)

    def begin(self, count_steps: Callable[[], int]) -> None:
        """Take what counts the steps of the sink's clipper, which is attached now."""
        self._count_steps, self._has_begun = count_steps, True
        others = (other for other in self._others if other is not self)
        self._counts_before.update((other, other._count_steps()) for other in others)

    @property
    def name(self) -> str:
        """The prefix for what is written now."""
        return self._name or self._settle()

    @property
    def names(self) -> list[str]:
        """All prefixes that sinks of the directory have had, also after their end."""
        return sorted(_names[self._directory])

    def release(self) -> None:
        """End the claim; the second call does nothing."""
        self._others.discard(self)
        for other in [*self._others]:
            if other._name is None and self._has_stepped_beside(other):
                other._settle()  # else its curves would go on where those of this one end
        if _owners.get((self._directory, self._name or "")) is self:
            del _owners[self._directory, self._name or ""]

    def _settle(self) -> str:
        names = itertools.chain([TOTAL], (f"{TOTAL}_{n}" for n in itertools.count(2)))
        name = next(name for name in names if self._may_take(name))
        self._take(name)
        return name

    def _take(self, name: str) -> None:
        owner = _owners.get((self._directory, name))
        if owner is not None:
            owner._name = ""
        self._name = name
        _owners[self._directory, name] = self
        _names[self._directory].add(name)

    def _may_take(self, name: str) -> bool:
        owner = _owners.get((self._directory, name))
        if owner is not None and not owner._count_steps():
            # It has not begun, or never will, as after an error before its first step.
            del owner
            gc.collect()
            return (self._directory, name) not in _owners
        return owner is None or not owner._has_stepped_beside(self)

    def _has_stepped_beside(self, other: PrefixClaim) -> bool:
        """Return whether its training went on after the clipper of the other was attached."""
        return other._has_begun and self._count_steps() > other._counts_before.get(self, 0)


_names: defaultdict[str, set[str]] = defaultdict(set)
"""Every prefix that a sink of a directory has had."""
_claims: defaultdict[str, WeakSet[PrefixClaim]] = defaultdict(WeakSet)
"""The claims in each directory."""
_owners: WeakValueDictionary[tuple[str, str], PrefixClaim] = WeakValueDictionary()
"""The claims by directory and prefix; a sink that nobody holds frees its prefix."""
