"""Names of parameters, their use in errors, and their selection by patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ArgumentError
from .wrapper_names import given_names, model_names, plain_name

ParameterChoice = str | Iterable[str] | Callable[[str, Tensor], object]
MOST_NAMED = 10
"""Most non-finite parameters that an error names."""
MOST_SHOWN = 5
"""Most names that an error shows of those that an option could have meant."""


@dataclass(frozen=True, slots=True)
class NamedParameter:
    """A parameter of an optimizer."""

    name: str
    """From the model, else from the optimizer, else made of its position in the groups."""
    parameter: Tensor
    optimizer: int
    """Index of the optimizer."""
    group: int
    """Index of its parameter group."""
    has_given_name: bool
    """True if the model or the optimizer gave the name, False if it was generated."""


def named_parameters(
    optimizers: Sequence[Optimizer], model: nn.Module | None
) -> Iterator[NamedParameter]:
    """Yield every parameter of the optimizers once, under a name that no other parameter has."""
    by_model = model_names(model) if model is not None else {}
    by_optimizer = _names_in_groups(optimizers)
    yielded: set[int] = set()
    taken = set(by_model.values())
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if id(parameter) in yielded:
                    continue
                name = by_model.get(id(parameter))
                if name is None:
                    name = by_optimizer.get((number, index, position), "")
                    name = "" if name in taken else name
                yielded.add(id(parameter))
                taken.add(name)
                shown = name or f"{group_name(optimizers, number, index)}, parameter {position}"
                yield NamedParameter(shown, parameter, number, index, bool(name))


def _names_in_groups(optimizers: Sequence[Optimizer]) -> dict[tuple[int, int, int], str]:
    """Return the names that a user has given, by optimizer, group and position."""
    names = {
        (number, index, position): name
        for number, optimizer in enumerate(optimizers)
        for index, group in enumerate(optimizer.param_groups)
        # torch keeps the names of named_parameters() there; parameters that were appended to a
        # group by hand have none.
        for position, name in enumerate(group.get("param_names") or ())
    }
    return dict(zip(names, given_names([*names.values()]), strict=True))


def group_name(optimizers: Sequence[Optimizer], optimizer: int, group: int) -> str:
    """Return the name of a parameter group."""
    several = f"optimizer {optimizer}, " if len(optimizers) > 1 else ""
    return f"{several}group {group}"


class ParameterSelection:
    """Parameters that a user's option selects, by names or by a function.

    Args:
        option: Name of the option, for errors.
        chosen: Names, in which ``*`` stands for any characters and ``?`` for one; or a function
            of name and parameter that returns True for them.

    Raises:
        ArgumentError: ``chosen`` is neither.
    """

    def __init__(self, option: str, chosen: ParameterChoice) -> None:
        self._option = option
        self.chosen = chosen if callable(chosen) else _names(option, chosen)

    def __bool__(self) -> bool:
        return bool(self.chosen)

    def __repr__(self) -> str:
        if isinstance(self.chosen, tuple) and len(self.chosen) == 1:
            return repr(self.chosen[0])
        return repr(self.chosen)

    def answer(self, name: str, parameter: Tensor) -> object:
        """Return what the function returns for a parameter, or whether a name matches it."""
        if callable(self.chosen):
            return self.chosen(name, parameter)
        return any(_matches(name, pattern) for pattern in self.chosen)

    def check(self, names: Sequence[str]) -> None:
        """Check that each name or pattern matches one of these parameters.

        Raises:
            ArgumentError: One matches none of them, as after a misspelling.
        """
        for pattern in () if callable(self.chosen) else self.chosen:
            if not any(_matches(name, pattern) for name in names):
                distinct = [*dict.fromkeys(names)]
                shown = ", ".join(distinct[:MOST_SHOWN]) or "none"
                more = ", ..." if len(distinct) > MOST_SHOWN else ""
                raise ArgumentError(
                    f"{self._option}={pattern!r} matches no parameter; there are {shown}{more}. "
                    "Names are the model's with model=."
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
    # Brackets are part of names, as in "weights[0]", not sets of characters.
    return fnmatchcase(name, plain_name(pattern).replace("[", "[[]"))


def describe_nonfinite(
    names: Sequence[str], gradients: Sequence[Tensor] | None, sums: Sequence[float]
) -> str:
    """List the parameters whose power sums are not finite, with counts of elements. Host sync.

    Args:
        names: Names of the parameters.
        gradients: Their gradients, whose elements are counted; None if not all of them are here.
        sums: Their power sums.
    """
    culprits = [index for index, total in enumerate(sums) if not math.isfinite(total)]
    shown = [names[index] for index in culprits]
    if gradients is not None:
        for position, index in enumerate(culprits[:MOST_NAMED]):
            shown[position] += f" ({_elements(gradients[index])})"
    return listed_nonfinite(shown)


def _elements(gradient: Tensor) -> str:
    values = gradient.coalesce()._values() if gradient.is_sparse else gradient
    count = int(values.numel() - torch.isfinite(values).sum())
    if not count:
        return "the sum of its powers exceeds the range of float64"
    return f"{count} of {values.numel()} elements"


def listed_nonfinite(descriptions: Sequence[str]) -> str:
    """Join descriptions of the parameters that are not finite, at most `MOST_NAMED` of them."""
    if not descriptions:
        return "none by itself: the sum of their powers exceeds the range of float64"
    more = len(descriptions) - MOST_NAMED
    return ", ".join(descriptions[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
