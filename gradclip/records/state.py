"""What a saved clipper looks like, and the check that something is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..checks import checked_count
from ..errors import ArgumentError, StateError
from ..scopes.labels import NormLabels
from .record import Counters

SHOWN = 5
"""Labels that an error names."""
KEYS = {"steps", "counters", "labels", "rule", "threshold"}


def parsed_state(state: Mapping[str, Any], labels: NormLabels, rule: str) -> tuple[int, Counters]:
    """Return steps and counters of a saved clipper.

    Args:
        state: The saved clipper.
        labels: Those of the clipper that it is for, brought up to date where it has others.
        rule: Name of the class of its threshold.

    Raises:
        StateError: It is not what ``GradientClipper.state_dict`` returns, or has other labels or
            another threshold.
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
        raise StateError(f"The state does not fit, {error} Nothing was loaded.") from None
    if counts["clipped"] > counts["finite"]:
        raise StateError(
            f"The state says that {counts['clipped']} of {counts['finite']} finite norms were "
            "clipped: give one that was not changed. Nothing was loaded."
        )
    if state["labels"] != list(labels.names):
        labels.refresh()  # groups may have been added since
    _check_labels(state["labels"], labels.names)
    return steps, Counters(**counts)


def _check_labels(found: object, needed: Sequence[str]) -> None:
    if not isinstance(found, Sequence) or list(found) != list(needed):
        raise StateError(
            f"The state has the labels {_shortened(found)}, the clipper has {_shortened(needed)}: "
            "give the clipper the scope, the model and the parameter groups it was saved with, in "
            "the order in which they were added. Nothing was loaded."
        )


def _shortened(labels: object) -> str:
    if not isinstance(labels, Sequence) or len(labels) <= SHOWN:
        return repr(labels)
    return f"[{', '.join(map(repr, labels[:SHOWN]))}, ...] ({len(labels)} of them)"


def _check_keys(name: str, found: object, needed: set[str]) -> None:
    if not isinstance(found, Mapping) or set(found) != needed:
        keys = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
        raise StateError(
            f"{name} has {keys}, needed are the keys {sorted(needed)}: give what "
            "GradientClipper.state_dict() returned. Nothing was loaded."
        )
