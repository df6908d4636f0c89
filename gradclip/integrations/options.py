"""The options of a callback, checked before an optimizer exists."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy, deepcopy
from inspect import signature
from typing import Any

from ..clipper import GradientClipper
from ..gradients.policies import Settings, check_rule
from ..records.sinks.log_option import check_log
from ..scopes.scope import scope_from
from ..thresholds import MaxNorm, Threshold, learns, threshold_from


def checked_options(max_norm: MaxNorm, options: Mapping[str, Any]) -> Threshold:
    """Refuse invalid options when a callback is made, not when training begins.

    Args:
        max_norm: As for `GradientClipper`.
        options: Other options of `GradientClipper`.

    Returns:
        The threshold that ``max_norm`` stands for.

    Raises:
        ArgumentError: An invalid option.
        EngineUnavailableError: An engine that this installation lacks.
        TypeError: An option that a clipper does not have.
    """
    bound = signature(GradientClipper).bind((), max_norm, **options)
    bound.apply_defaults()
    settings = Settings(**{name: bound.arguments[name] for name in Settings.__dataclass_fields__})
    scope_from(bound.arguments["scope"])
    check_log(bound.arguments["log"])
    threshold = threshold_from(max_norm)
    check_rule(settings, threshold)
    return threshold


def as_new(threshold: Threshold) -> Threshold:
    """Return a copy of a callback's threshold, for one clipper."""
    # A schedule may be a method of the user's own object, which a deep copy would copy as well.
    return deepcopy(threshold) if learns(threshold) else copy(threshold)
