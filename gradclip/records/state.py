"""The check of a clipper's state dict before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from ..checks import checked_count
from ..errors import ArgumentError, StateError
from ..scopes.labels import NormLabels
from ..scopes.wrapper_names import are_same
from .counting import NO_MICRO_BATCHES, Counters, MicroBatchCounts

SHOWN = 5
"""Labels that an error shows."""
KEYS = {"steps", "counters", "labels", "rule", "threshold"}
MICRO_BATCHES = "micro_batches"
"""The key that only the states of runs with micro-batches have."""
NONE_TAKEN = NO_MICRO_BATCHES._asdict()


def parsed_state(state: Mapping[str, Any], labels: NormLabels, rule: str) -> tuple[int, Counters]:
    """Return the number of steps and the counters in a saved state.

    Args:
        state: What ``GradientClipper.state_dict`` returned, or anything else that a file held.
        labels: Labels of the clipper that loads; refreshed if the state has others.
        rule: Name of the class of the clipper's threshold.

    Raises:
        StateError: The state is not one of a clipper, or has other labels or another threshold.
    """
    _check_keys("state", state, KEYS, {MICRO_BATCHES})
    counters, micro_batches = state["counters"], state.get(MICRO_BATCHES, NONE_TAKEN)
    _check_keys("state['counters']", counters, {f.name for f in fields(Counters)} - {MICRO_BATCHES})
    _check_keys(f"state[{MICRO_BATCHES!r}]", micro_batches, {*NONE_TAKEN})
    if state["rule"] != rule:
        raise StateError(
            f"The threshold is {rule} and the state is of {state['rule']!r}: load it into a "
            "clipper with the threshold it was saved from. Nothing was loaded."
        )
    try:
        counts = {k: checked_count(k, v) for k, v in counters.items()}
        taken = {k: checked_count(k, v) for k, v in micro_batches.items()}
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
    return steps, Counters(**counts, micro_batches=MicroBatchCounts(**taken))


def _check_labels(given: object, needed: Sequence[str]) -> None:
    if not isinstance(given, Sequence) or not are_same([*map(str, given)], needed):
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


def counters_in_state(counters: Counters) -> dict[str, dict[str, int]]:
    """Return the part of a state that holds the counters."""
    counts = asdict(counters)
    del counts[MICRO_BATCHES]
    state = {"counters": counts}
    if counters.micro_batches.taken:
        state[MICRO_BATCHES] = counters.micro_batches._asdict()
    return state


def _check_keys(name: str, given: object, needed: set[str], optional: Collection[str] = ()) -> None:
    if not isinstance(given, Mapping) or {*given}.difference(optional) != needed:
        keys = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise StateError(
            f"{name} has {keys} and needs the keys {sorted(needed)}: give what "
            "GradientClipper.state_dict() returned. Nothing was loaded."
        )
