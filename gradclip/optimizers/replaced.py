"""Clippers that nobody holds any more, and that a new one may replace on its optimizers.

A clipper without a name goes on clipping: its hooks hold it. In a cell that is run again it is in
the way, and the user has nothing left to detach it by.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from types import MethodType
from typing import Any
from weakref import ref

from torch.optim import Optimizer

from ..errors import AttachError
from .attachment import attachment_of


def check_replaceable(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers with a clipper that someone holds, or that clips another optimizer as well.

    Raises:
        AttachError: There is such a clipper.
    """
    for optimizer in optimizers:
        earlier = attachment_of(optimizer)
        if earlier is None:
            continue
        joined = all(any(other is one for one in optimizers) for other in earlier.optimizers)
        if not joined or _is_held(ref(earlier.clipper)):
            raise AttachError(
                f"Another GradientClipper is attached to this {type(optimizer).__name__}: detach() "
                "or close() it first, or use the one that is there."
            )


def close_replaced(optimizers: Sequence[Optimizer]) -> None:
    """Close the earlier clippers of optimizers, all of which `check_replaceable` has allowed."""
    for optimizer in optimizers:
        earlier = attachment_of(optimizer)
        if earlier is not None:
            earlier.clipper.close()


class _Probe:
    """An object that one variable refers to."""


def _is_held(clipper: ref[Any]) -> bool:
    """Return whether anything but its own parts refers to a clipper.

    Its parts do through its private methods. Variables of running functions show in the number of
    references alone, which is compared with that of an object in the same place.
    """
    probe = _Probe()
    surplus = _count_references(clipper) - (_count_references(ref(probe)) - 1)
    return surplus > sum(map(_is_own, gc.get_referrers(clipper())))


def _count_references(item: ref[Any]) -> int:
    strong = item()
    return sys.getrefcount(strong)


def _is_own(referrer: object) -> bool:
    name = referrer.__name__ if isinstance(referrer, MethodType) else ""
    return name.startswith("_") and not name.startswith("__")
