"""A choice of parameters: by names with wildcards, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from ..errors import ArgumentError

Chosen = str | Iterable[str] | Callable[[str, Tensor], object]
SHOWN = 5
"""Names that an error shows."""


class Selection:
    """Parameters that an option speaks of.

    Args:
        option: Its name, for errors.
        chosen: Names, in which ``*`` and ``?`` stand for any letters and any letter; or a function
            of name and parameter that is true for them.

    Raises:
        ArgumentError: It is neither.
    """

    def __init__(self, option: str, chosen: Chosen) -> None:
        self._option = option
        self.chosen = chosen if callable(chosen) else _names(option, chosen)

    def __bool__(self) -> bool:
        return bool(self.chosen)

    def __repr__(self) -> str:
        if isinstance(self.chosen, tuple) and len(self.chosen) == 1:
            return repr(self.chosen[0])
        return repr(self.chosen)

    def of(self, name: str, parameter: Tensor) -> object:
        """Return what the function says of a parameter; of names, whether one of them is its."""
        if callable(self.chosen):
            return self.chosen(name, parameter)
        return any(_matches(name, pattern) for pattern in self.chosen)

    def check(self, names: Sequence[str]) -> None:
        """Refuse names that do nothing.

        Raises:
            ArgumentError: One matches no parameter.
        """
        for pattern in () if callable(self.chosen) else self.chosen:
            if not any(_matches(name, pattern) for name in names):
                each = [*dict.fromkeys(names)]
                some = ", ".join(each[:SHOWN])
                raise ArgumentError(
                    f"{self._option}={pattern!r} matches no parameter; there are {some or 'none'}"
                    f"{', ...' if len(each) > SHOWN else ''}. Names are the model's with model=."
                )


def _names(option: str, chosen: object) -> tuple[str, ...]:
    names = (chosen,) if isinstance(chosen, str) else chosen
    if isinstance(names, Iterable):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise ArgumentError(
        f"{option} is {chosen!r}: give a name or several, or a function of name and parameter."
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]"))
