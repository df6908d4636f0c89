"""Where a call of ``step`` has its closure."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
NAME = "closure"


class ClosureFinder:
    """Finds the closure among the arguments of an optimizer's ``step``.

    It is the parameter named ``closure``; of a step without one, the first function it is given.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        names = list(inspect.signature(type(optimizer).step).parameters)
        self._place = names.index(NAME) if NAME in names else None

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any] | None:
        """Return the closure; None counts as absent. ``args`` begins with the optimizer."""
        if len(args) == 1 and not kwargs:
            return None
        place = self._find(args, kwargs)
        found: Callable[..., Any] | None = None
        if isinstance(place, int):
            found = args[place]
        elif place is not None:
            found = kwargs[place]
        return found

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[..., Any]
    ) -> Arguments:
        """Return the arguments with another closure in the place of the one that was found."""
        place = self._find(args, kwargs)
        if isinstance(place, int):
            return (*args[:place], closure, *args[place + 1 :]), kwargs
        return args, {**kwargs, str(place): closure}

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
        if self._place is not None:
            if len(args) > self._place:
                return self._place if args[self._place] is not None else None
            return NAME if kwargs.get(NAME) is not None else None
        places: list[int | str] = [*range(1, len(args)), *kwargs]
        values = [*args[1:], *kwargs.values()]
        functions = (p for p, value in zip(places, values, strict=True) if _is_function(value))
        return next(functions, None)


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, Tensor | nn.Module | type)
