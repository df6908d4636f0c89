"""Finds and replaces the closure among the arguments of an optimizer's ``step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
NAME = "closure"


class ClosureFinder:
    """Finds the closure that one optimizer's ``step`` is given.

    That is the argument named ``closure``. Where ``step`` has no such parameter, it is the first
    argument that is a function.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        names = list(inspect.signature(type(optimizer).step).parameters)
        self._position = names.index(NAME) if NAME in names else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the closure; None counts as absent. ``args`` begins with the optimizer."""
        key = self._key(args, kwargs)
        closure: Callable[..., Any] | None = None
        if isinstance(key, int):
            closure = args[key]
        elif key is not None:
            closure = kwargs[key]
        return closure

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any]
    ) -> Arguments:
        """Return the arguments with another closure instead of the one that `find` returns."""
        key = self._key(args, kwargs)
        if isinstance(key, int):
            return (*args[:key], closure, *args[key + 1 :]), kwargs
        return args, {**kwargs, str(key): closure}

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
        """Return the closure's index in ``args`` or its name in ``kwargs``."""
        if self._position is not None:
            if len(args) > self._position:
                return self._position if args[self._position] is not None else None
            return NAME if kwargs.get(NAME) is not None else None
        keys: list[int | str] = [*range(1, len(args)), *kwargs]
        values = [*args[1:], *kwargs.values()]
        functions = (key for key, value in zip(keys, values, strict=True) if _is_function(value))
        return next(functions, None)


def _is_function(value: object) -> bool:
    # Modules and classes can be called, too, and are no closures.
    return callable(value) and not isinstance(value, Tensor | nn.Module | type)
