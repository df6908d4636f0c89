"""Optimizers whose ``step`` calls the ``step`` of a parent class, which fires the hooks again.

Before that call such a step may change the gradients, for instance average them over processes or
clip them. A clipper waits for the innermost step, which works with the gradients as they are then.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch.optim import Optimizer

ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
"""Instructions that load an attribute, in one or another version of Python."""


def count_parent_steps(kind: type[Optimizer]) -> int:
    """Return how many steps of parent classes each step of an optimizer class runs through.

    Makes these steps call the hooks, as torch does once an optimizer of that very class is built:
    else the count would depend on the optimizers that the process has made.
    """
    # A class without a step of its own gets its parent's when torch makes that call the hooks.
    steps = {inspect.unwrap(base.__dict__["step"]): base for base in _owners(kind)[::-1]}
    chain = [*steps.values()][::-1]
    count = 0
    for owner, parent in pairwise(chain):
        if not _calls_parent(owner, chain):
            break
        if issubclass(parent, Optimizer):  # and no mixin, whose other users have no hooks
            _make_hooked(parent)
            count += 1
    return count


def may_call_parents_step(kind: type[Optimizer]) -> bool:
    """Return whether a class outside torch overrides a ``step`` that it may call."""
    owners = _owners(kind)
    return len(owners) > 1 and not owners[0].__module__.startswith("torch.optim")


def make_step_hooked(kind: type[Optimizer]) -> None:
    """Make the step of an optimizer class call the hooks, as building an optimizer of it does."""
    _make_hooked(_owners(kind)[0])


def _owners(kind: type[Optimizer]) -> list[Any]:
    return [base for base in kind.__mro__ if "step" in vars(base) and base is not Optimizer]


def _make_hooked(kind: Any) -> None:
    step = vars(kind)["step"]
    if not getattr(step, "hooked", False):
        kind.step = Optimizer.profile_hook_step(step)
        kind.step.hooked = True


def _calls_parent(owner: type, chain: Sequence[type]) -> bool:
    """Return whether the ``step`` of a class, or a method that it names, calls a parent's."""
    step = inspect.unwrap(vars(owner)["step"])
    methods = [getattr(owner, name, None) for name in step.__code__.co_names]
    parents = {parent.__name__ for parent in chain if parent is not owner}
    for function in (step, *map(inspect.unwrap, filter(inspect.isfunction, methods))):
        names = {*function.__code__.co_names}
        if "step" in _loaded_from_super(function) or ("step" in names and parents & names):
            return True
    return False


def _loaded_from_super(function: Any) -> Iterator[str]:
    """Yield the attributes that a function loads from ``super()``."""
    of_super = False
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":
            of_super |= name == "super"
        # Horovod's optimizer calls super(self.__class__, self).step(closure).
        elif instruction.opname in ATTRIBUTES and of_super and name != "__class__":
            yield name
            of_super = False
