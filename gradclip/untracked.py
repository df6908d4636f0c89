"""Gradient tracking switched off for a call, at a fraction of what ``torch.no_grad()`` costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def untracked(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as ``torch.no_grad()`` would: what it writes has no history."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return call
