"""Operations on a number or on a vector of them, so that a rule is written once for both.

One norm on the CPU is the usual case. Worked on as a number it is ten times as fast, and with the
same bits: each operation rounds alike. Only a number divided by a vector does not; torch makes a
product of that.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..engines.base import host_may_read

NumberOrTensor = TypeVar("NumberOrTensor", float, Tensor)


def is_number(norms: Tensor) -> bool:
    """Tell whether this is one norm that the host may read without waiting."""
    return norms.numel() == 1 and host_may_read(norms)


def where(condition: Any, chosen: Any, other: Any) -> Any:
    """Return ``chosen`` where the condition holds, else ``other``; both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, other)
    return chosen if condition else other


def square_root(value: NumberOrTensor) -> NumberOrTensor:
    """Return the square root of what is not negative."""
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)
