"""What a saved clipper looks like, and the check that something is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .checks import checked_count
from .errors import ArgumentError, StateError
from .records import Counters

KEYS = {"steps", "counters", "threshold"}


def parsed_state(state: Mapping[str, Any]) -> tuple[int, Counters]:
    """Return steps and counters of a saved clipper.

    Raises:
        StateError: It is not what ``GradientClipper.state_dict`` returns.
    """
    _check_keys("state", state, KEYS)
    _check_keys("state['counters']", state["counters"], {f.name for f in fields(Counters)})
    try:
        counts = {k: checked_count(k, v) for k, v in state["counters"].items()}
        steps = checked_count("steps", state["steps"])
    except ArgumentError as error:
        raise StateError(f"The state does not fit, {error} Nothing was loaded.") from None
    return steps, Counters(**counts)


def _check_keys(name: str, found: object, needed: set[str]) -> None:
    if not isinstance(found, Mapping) or set(found) != needed:
        keys = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise StateError(
            f"{name} has {keys}, needed are the keys {sorted(needed)}: give what "
            "GradientClipper.state_dict() returned. Nothing was loaded."
        )
