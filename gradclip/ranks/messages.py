"""What a clipper tells those of other ranks, and what they have agreed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..scopes.labels import GroupThresholds, NormKey


@dataclass(frozen=True, slots=True)
class ParameterMessage:
    """A parameter that is in some norm."""

    name: str
    given: bool
    """Whether it is the model's or the optimizer's name, not a place in the groups."""
    shape: tuple[int, ...]
    labels: list[int]
    """Which of the norms that its rank tells are its own: one, or with ``rows`` one for each index
    of dimension 0, and `NOWHERE` for none."""
    rows: bool
    copy_of: str | None
    """What all copies of it are called, where there are others."""
    mesh: tuple[int, ...]
    """The ranks of a DTensor, which knows what of it is here; empty for others."""


@dataclass(frozen=True, slots=True)
class ClipperMessage:
    """What a rank tells of its clipper."""

    scope: str
    options: Mapping[str, str]
    thresholds: GroupThresholds
    parameters: list[ParameterMessage]
    names: list[str]
    """Those of all parameters, in a norm or not."""
    elsewhere: list[str]
    """Those of DTensors on other ranks alone."""
    wants_parameter_norms: bool
    """Whether the norms of parameters are asked for."""
    error: str | None = None
    """Why it cannot be attached."""


@dataclass(frozen=True, slots=True)
class FailureMessage:
    """What a rank tells that has no clipper."""

    error: str


@dataclass(frozen=True, slots=True)
class Original:
    """The first of the copies of a parameter, which counts."""

    rank: int
    ranks: set[int]
    """Those that have a part of it: of a DTensor several."""
    name: str
    shape: tuple[int, ...]
    keys: list[NormKey | None]
    """Its norm, or with ``rows`` one for each index of dimension 0, and None for none."""
    rows: bool


@dataclass(slots=True)
class Agreement:
    """What holds on all ranks."""

    thresholds: GroupThresholds = field(default_factory=dict)
    originals: dict[str, Original] = field(default_factory=dict)
    """By what all their copies are called."""
    names: dict[str, int] = field(default_factory=dict)
    """The parameters of all ranks that are in some norm, with their places."""
    places: dict[str, int] = field(default_factory=dict)
    """Those of this rank, under its own names, with their places among all."""
    all_names: list[str] = field(default_factory=list)
    """Names of all parameters, in a norm or not."""
    wants_parameter_norms: bool = False
