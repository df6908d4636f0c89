"""A decorator that turns gradient tracking off during a call, cheaper than ``torch.no_grad()``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R], compiled: Callable[..., R] | None = None) -> Callable[P, R]:
    """Run a function as under ``torch.no_grad()``: its writes leave no autograd history.

    Args:
        function: The function to call.
        compiled: Called instead inside code that ``torch.compile`` traces, which cannot turn
            tracking on again after an exception. It must leave no history by itself.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if compiled is not None and torch.compiler.is_compiling():
            return compiled(*args, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        # torch.no_grad() makes an object and saves the mode: 3 us a step for a flag.
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    return call
