"""The check of a clipper's state dict before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..checks import checked_count
from ..errors import ArgumentError, StateError
from ..scopes.labels import NormLabels
from .counting import Counters

SHOWN = 5
"""Labels that an error shows."""
KEYS = {"steps", "counters", "labels", "rule", "threshold"}


def parsed_state(state: Mapping[str, Any], labels: NormLabels, rule: str) -> tuple[int, Counters]:
    """Return the number of steps and the counters in a saved state.

    Args:
        state: What ``GradientClipper.state_dict`` returned, or anything else that a file held.
        labels: Labels of the clipper that loads; refreshed if the state has others.
        rule: Name of the class of the clipper's threshold.

    Raises:
        StateError: The state is not one of a clipper, or has other labels or another threshold.
    """
    _check_keys("state", state, KEYS)
    _check_keys("state['counters']", state["counters"], {f.name for f in fields(Counters)})
    if state["rule"] != rule:
        raise StateError(
            f"The threshold is {rule} and the state is of {state['rule']!r}: load it into a "
            "clipper with the threshold it was saved from. Nothing was loaded."
        )
    try:
        counts = {k: checked_count(k, v) for k, v in state["counters"].items()}
        steps = checked_count("steps", state["steps"])
    except ArgumentError as error:
        raise StateError(f"The state is invalid, {error} Nothing was loaded.") from None
    if counts["clipped"] > counts["finite"]:
        raise StateError(
            f"The state says that {counts['clipped']} of {counts['finite']} finite norms were "
            "clipped: give a state that was not edited. Nothing was loaded."
        )
    if state["labels"] != list(labels.names):
        labels.refresh()  # parameter groups may have been added since the last step
    _check_labels(state["labels"], labels.names)
    return steps, Counters(**counts)


def _check_labels(given: object, needed: Sequence[str]) -> None:
    if not isinstance(given, Sequence) or list(given) != list(needed):
        raise StateError(
            f"The state has the labels {_shortened(given)}, the clipper has {_shortened(needed)}: "
            "give the clipper the scope, the model and the parameter groups it was saved with, in "
            "the order in which they were added. Nothing was loaded."
        )


def _shortened(labels: object) -> str:
    """Return a repr of labels that stays short: a scope of units may have thousands."""
    if not isinstance(labels, Sequence) or len(labels) <= SHOWN:
        return repr(labels)
    return f"[{', '.join(map(repr, labels[:SHOWN]))}, ...] ({len(labels)} of them)"


def _check_keys(name: str, given: object, needed: set[str]) -> None:
    if not isinstance(given, Mapping) or set(given) != needed:
        keys = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise StateError(
            f"{name} has {keys} and needs the keys {sorted(needed)}: give what "
            "GradientClipper.state_dict() returned. Nothing was loaded."
        )
