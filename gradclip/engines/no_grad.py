"""Gradient tracking switched off for a call, at a fraction of what ``torch.no_grad()`` costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R], compiled: Callable[..., R] | None = None) -> Callable[P, R]:
    """Run a function as ``torch.no_grad()`` would: what it writes has no history.

    Args:
        function: What is called.
        compiled: What code that ``torch.compile`` makes calls in its place, unable to switch
            tracking on again after an exception: it has to leave no history by itself.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if compiled is not None and torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return call
