"""The options of a callback, checked before an optimizer exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from inspect import signature
from typing import Any

from ..clipper import GradientClipper
from ..gradients.policies import Settings
from ..records.sinks.log_option import check_log
from ..scopes.scope import scope_from
from ..thresholds import Threshold, learns, threshold_from


def checked_options(
    max_norm: float | Threshold | Callable[[int], float | None] | None, options: Mapping[str, Any]
) -> Threshold:
    """Refuse when a callback is made what would be refused when training begins.

    Args:
        max_norm: As `GradientClipper` takes it.
        options: Other options of `GradientClipper`.

    Returns:
        The threshold that ``max_norm`` stands for.

    Raises:
        ArgumentError: An option that cannot be meant.
        EngineUnavailableError: An engine that this installation lacks.
        TypeError: An option that a clipper does not have.
    """
    given = signature(GradientClipper).bind((), max_norm, **options)
    given.apply_defaults()
    Settings(**{name: given.arguments[name] for name in Settings.__dataclass_fields__})
    scope_from(given.arguments["scope"])
    check_log(given.arguments["log"])
    return threshold_from(max_norm)


def as_new(threshold: Threshold) -> Threshold:
    """Return a copy of a threshold that a callback was given, for one clipper."""
    # What a function is bound to is not to be copied.
    return deepcopy(threshold) if learns(threshold) else copy(threshold)
