"""The check that a saved state belongs to a rule, before any of it is taken over."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import StateError

RULE = "rule"
"""The key under which a state names the rule that it was saved from."""
_ENDLESS = 2**53
"""A count that no run reaches, far from where it would overflow."""


def checked_state(rule: str, needed: Mapping[str, Tensor], found: object) -> dict[str, Tensor]:
    """Return the tensors of a saved state, on the device and of the dtype of the present ones.

    Norms that are too large for a narrower dtype become its largest number. Host sync.

    Args:
        rule: Name of the rule's class.
        needed: The present state of the rule.
        found: What the user gave.

    Raises:
        StateError: It is not what ``state_dict`` of such a rule returned.
    """
    if not isinstance(found, Mapping):
        raise _refused(f"The state of the threshold {rule} is a {type(found).__name__}, not a dict")
    if found.get(RULE) != rule:
        raise _refused(f"The threshold is {rule} and the state is of {found.get(RULE, 'no rule')}")
    keys = {RULE, *needed}
    if set(found) != keys:
        names = [sorted(map(str, each)) for each in (found, keys)]
        raise _refused(f"The state of {rule} has the keys {names[0]} and needs {names[1]}")
    return {
        name: _checked(f"{rule}'s {name!r}", like, found[name]) for name, like in needed.items()
    }


def _checked(name: str, like: Tensor, found: object) -> Tensor:
    if not isinstance(found, Tensor) or found.is_meta or found.layout is not torch.strided:
        raise _refused(f"{name} is a {type(found).__name__}, not a dense tensor with values")
    if found.shape != like.shape:
        raise _refused(
            f"{name} has the shape {tuple(found.shape)} and needs {tuple(like.shape)}, which are "
            "the number of norms and, where there is one, the size of the window"
        )
    if _kind(found) != _kind(like):
        raise _refused(f"{name} is of {found.dtype} and needs {like.dtype}")
    counts = not like.is_floating_point()
    if not bool(((found >= 0) & (found < (_ENDLESS if counts else math.inf))).all()):
        raise _refused(f"{name} holds numbers that are negative, not finite or endless counts")
    converted = found.detach().to(like)
    return converted if counts else converted.clamp(max=torch.finfo(like.dtype).max)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "other" if tensor.is_complex() or tensor.dtype is torch.bool else "count"


def _refused(found: str) -> StateError:
    return StateError(
        f"{found}: load the state into a clipper with the labels and the threshold it was saved "
        "from. Nothing was loaded."
    )
