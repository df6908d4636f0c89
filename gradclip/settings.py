"""The options of a clipper, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import checked_bound, checked_count, checked_order
from .engines import check_engine_name
from .errors import ArgumentError, NotAvailableError

EXCEED = ("scale", "observe", "skip")
NONFINITE = ("zero", "skip", "raise", "propagate")


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

    @property
    def previews(self) -> bool:
        """Whether what ``max_value`` would do has to be known before anything is written."""
        return self.max_value is not None and self.exceed != "scale"


def check_later_parts(*, ranks: object) -> None:
    """Refuse, with a clear error, what the interface has and this version lacks."""
    if ranks is not None:
        raise not_available("ranks=", "leave it at None, and train in one process or under DDP")


def not_available(what: str, remedy: str) -> NotAvailableError:
    """Return the error for a part that this version lacks."""
    return NotAvailableError(f"{what} is not available in this version of gradclip: {remedy}.")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} is {value!r}: give one of {', '.join(map(repr, known))}.")
