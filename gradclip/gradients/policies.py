"""The options that decide what a clipper does with a norm, checked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import __version__
from ..checks import checked_bound, checked_count, checked_order
from ..engines import check_engine_name
from ..errors import ArgumentError, AttachError
from ..thresholds import Threshold

SHOWN = 20
"""Names of norms that a description shows."""
EXCEED = ("scale", "observe", "skip")
NONFINITE = ("zero", "skip", "raise", "propagate")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a clipper measures and what it does; see `GradientClipper` for the meaning of each.

    Raises:
        ArgumentError: An option that cannot be meant.
        EngineUnavailableError: An engine that this installation lacks.
    """

    norm_type: float = 2.0
    max_value: float | None = None
    exceed: str = "scale"
    nonfinite: str = "zero"
    skip_limit: int | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Check every option and bring the numbers to float."""
        object.__setattr__(self, "norm_type", checked_order(self.norm_type))
        if self.max_value is not None:
            object.__setattr__(self, "max_value", checked_bound("max_value", self.max_value))
        _one_of("exceed", self.exceed, EXCEED)
        _one_of("nonfinite", self.nonfinite, NONFINITE)
        if self.skip_limit is not None:
            checked_count("skip_limit", self.skip_limit, 1)
        check_engine_name(self.engine)

    @property
    def writes(self) -> bool:
        """Whether gradients may be changed at all."""
        return self.exceed != "observe"

    @property
    def erases(self) -> bool:
        """Whether gradients whose norm is not finite become 0."""
        return self.nonfinite == "zero"

    @property
    def skips(self) -> bool:
        """Whether steps may be left out without an error."""
        return self.writes and "skip" in (self.exceed, self.nonfinite)

    @property
    def raises(self) -> bool:
        """Whether a norm that is not finite is an error, which the host has to know at once."""
        return self.writes and self.nonfinite == "raise"


def options_of(settings: Settings, threshold: object, scope: object) -> dict[str, str]:
    """Return what decides how a clipper clips, by the names of its options, for people.

    Args:
        settings: Its settings.
        threshold: Its threshold.
        scope: Its scope.
    """
    return {
        "max_norm": repr(threshold),
        "norm_type": f"{settings.norm_type:g}",
        "max_value": str(settings.max_value),
        "scope": scope if isinstance(scope, str) else repr(scope),
        "exceed": settings.exceed,
        "nonfinite": settings.nonfinite,
        "skip_limit": str(settings.skip_limit),
    }


def described(
    options: Mapping[str, str], norms: Sequence[str], optimizers: Sequence[object], engine: str
) -> dict[str, str]:
    """Return how a clipper is set and what it serves, for people.

    Args:
        options: Its options.
        norms: Names of its norms.
        optimizers: What it is attached to.
        engine: The engines that serve it.
    """
    shown = ", ".join(norms[:SHOWN]) + (", ..." if len(norms) > SHOWN else "")
    return {
        "optimizer": ", ".join(type(optimizer).__name__ for optimizer in optimizers),
        **options,
        "norms": f"{len(norms)}: {shown}",
        "engine": engine,
        "gradclip": __version__,
        "torch": torch.__version__,
    }


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} is {value!r}: give one of {', '.join(map(repr, known))}.")


def check_capture(settings: Settings, threshold: Threshold) -> None:
    """Refuse to be captured in a CUDA graph, in which no Python runs, where that would go wrong.

    Raises:
        AttachError: A policy or a threshold needs the host at every step.
    """
    if settings.raises:
        raise AttachError(
            "nonfinite='raise' has to look at every norm, and a captured CUDA graph runs without "
            "the host: choose another policy, or call optimizer.step() outside the graph."
        )
    if not threshold.capturable:
        raise AttachError(
            f"{threshold!r} is asked anew at every step, and a captured CUDA graph runs without "
            "Python: give a threshold whose class says 'capturable = True', since it does the same "
            "at every step and writes its state in place; or call optimizer.step() outside."
        )
