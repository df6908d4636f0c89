"""The options of a clipper, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import checked_bound, checked_order
from .engines import check_engine_name
from .errors import ArgumentError, NotAvailableError

EXCEED = ("scale", "observe", "skip")
NONFINITE = ("zero", "skip", "raise", "propagate")
SCOPES = ("global", "group", "parameter", "unit")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a clipper measures and what it does; see `GradientClipper` for the meaning of each.

    Raises:
        ArgumentError: An option that cannot be meant.
        NotAvailableError: An option that this version lacks.
        EngineUnavailableError: An engine that this installation lacks.
    """

    norm_type: float = 2.0
    max_value: float | None = None
    exceed: str = "scale"
    nonfinite: str = "zero"
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Check every option and bring the numbers to float."""
        object.__setattr__(self, "norm_type", checked_order(self.norm_type))
        if self.max_value is not None:
            object.__setattr__(self, "max_value", checked_bound("max_value", self.max_value))
        _one_of("exceed", self.exceed, EXCEED)
        if self.exceed == "skip":
            raise not_available("exceed='skip'", "give exceed='scale' or exceed='observe'")
        _one_of("nonfinite", self.nonfinite, NONFINITE)
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
    def judges(self) -> bool:
        """Whether the host has to know before the step if a norm is not finite."""
        return self.writes and self.nonfinite in ("skip", "raise")


def check_later_parts(
    *, scope: object, skip_limit: object, ranks: object, grad_scaler: object
) -> None:
    """Refuse, with a clear error, what the interface has and this version lacks."""
    if isinstance(scope, str):
        _one_of("scope", scope, SCOPES)
    if scope != "global":
        raise not_available(f"scope={scope!r}", "give scope='global'")
    if skip_limit is not None:
        raise not_available(f"skip_limit={skip_limit!r}", "leave it at None")
    if ranks is not None:
        raise not_available("ranks=", "leave it at None, and train in one process or under DDP")
    if grad_scaler is not None:
        raise not_available(
            "grad_scaler=", "call grad_scaler.unscale_(optimizer) before each step instead"
        )


def not_available(what: str, remedy: str) -> NotAvailableError:
    """Return the error for a part that this version lacks."""
    return NotAvailableError(f"{what} is not available in this version of gradclip: {remedy}.")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} is {value!r}: give one of {', '.join(map(repr, known))}.")
