"""The options of a clipper, such as its actions on excessive and non-finite norms."""

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
"""Largest number of norm names that a description lists."""
EXCEED = ("scale", "observe", "skip")
NONFINITE = ("zero", "skip", "raise", "propagate")


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a clipper that are plain values; `GradientClipper` explains each.

    Raises:
        ArgumentError: An invalid option.
        EngineUnavailableError: The engine is not available in this installation.
    """

    norm_type: float = 2.0
    max_value: float | None = None
    exceed: str = "scale"
    nonfinite: str = "zero"
    skip_limit: int | None = None
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Check every option and convert numbers to float."""
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
        """True if gradients may be written at all."""
        return self.exceed != "observe"

    @property
    def erases(self) -> bool:
        """True if gradients whose norm is NaN or infinite become 0."""
        return self.nonfinite == "zero"

    @property
    def skips(self) -> bool:
        """True if steps may be skipped without an error."""
        return self.writes and "skip" in (self.exceed, self.nonfinite)

    @property
    def raises(self) -> bool:
        """True if a NaN or infinite norm is an error, for which the host reads every norm."""
        return self.writes and self.nonfinite == "raise"


def options_of(settings: Settings, threshold: object, scope: object) -> dict[str, str]:
    """Return a readable value for each option that decides how a clipper clips.

    Logs show these, and ranks compare them.

    Args:
        settings: The settings of the clipper.
        threshold: Its threshold.
        scope: Its scope, as given.
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
    """Return a readable description of a clipper for the logs: its options and environment.

    Args:
        options: The options, from `options_of`.
        norms: The names of its norms.
        optimizers: Its optimizers.
        engine: The names of its engines.
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


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} is {value!r}: give one of {', '.join(map(repr, choices))}.")


def check_rule(settings: Settings, threshold: Threshold) -> None:
    """Refuse a rule that does not fit the action on excessive norms.

    Raises:
        ArgumentError: A rule whose thresholds of 0 are to skip steps would set gradients to 0.
    """
    if threshold.needs_skip and settings.exceed == "scale":
        raise ArgumentError(
            f"{threshold!r} answers a spike with a threshold of 0, and exceed='scale' would set "
            "the gradients to 0 and step with them: give exceed='skip', which skips the step, or "
            "exceed='observe'."
        )


def check_capture(settings: Settings, threshold: Threshold, *, stale_loss: bool = False) -> None:
    """Refuse the capture of a step in a CUDA graph whose replays would not clip rightly.

    A replay repeats kernels and runs no Python.

    Args:
        settings: The settings of the clipper.
        threshold: Its threshold.
        stale_loss: Whether the step has a loss that was assigned before the capture.

    Raises:
        AttachError: A policy or the threshold needs the host at every step.
    """
    if settings.raises:
        raise AttachError(
            "nonfinite='raise' reads every norm on the host, and a captured CUDA graph runs "
            "without the host: choose another policy, or call optimizer.step() outside the graph."
        )
    if not threshold.capturable:
        raise AttachError(
            f"{threshold!r} is called at every step, and a captured CUDA graph runs without "
            "Python: give a threshold whose class sets 'capturable = True', because it does the "
            "same at every step and writes its state in place; or call optimizer.step() outside "
            "the graph."
        )
    if stale_loss:
        raise AttachError(
            "The loss was assigned before the CUDA graph was captured, so that every replay would "
            "log the value of that moment: assign clipper.loss within the capture, a tensor that "
            "the captured forward pass computes."
        )
