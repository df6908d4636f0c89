"""One step on the host, as plain numbers: the row that sinks write and the report reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class LoggedStep(NamedTuple):
    """One step as a sink gets it: plain numbers, totals over all norms, counts since the start.

    <!-- test: tests/contracts/sinks/test_contract.py; tests/logging/test_jsonl.py
    -k all_numbers -->
    """

    step: int
    """Index of the step, from 0."""
    wall_time: float
    """When the step was taken, in seconds since the epoch."""
    norm: float
    """Total norm before clipping; NaN or infinite if the gradients were."""
    clipped_norm: float
    """Total norm afterwards."""
    threshold: float | None
    """The threshold; None if there is none, or more than one."""
    coefficient: float
    """The smallest coefficient."""
    nonfinite: bool
    """Whether a norm was NaN or infinite."""
    skipped: bool
    """Whether the whole step was skipped."""
    clip_rate: float
    """Share of the finite norms so far that were reduced; 0 before the first."""
    nonfinite_steps: int
    """Steps so far with a norm that was not finite."""
    skipped_steps: int
    """Steps so far that were skipped."""
    parameter_norms: Mapping[str, float] | None = None
    """Norm of each parameter's gradient by the parameter's name, before clipping; None if unknown,
    as in a CUDA graph, or if no sink asks for them."""
    incident: str | None = None
    """A sentence about a step whose norm or loss was not finite, or far above those before it."""
    loss: float | None = None
    """The loss, NaN or infinite if it was so; across ranks its mean; None if none was given."""
    micro_batch_clip_rate: float | None = None
    """Share of the micro-batches so far that were clipped by themselves; None before the first."""
    nonfinite_micro_batches: int | None = None
    """Micro-batches so far with a norm that was not finite; None before the first."""
    weight_norms: Mapping[str, float] | None = None
    """Norm of each parameter before the step; None where `Sink.weights_every` leaves it out."""
    update_ratios: Mapping[str, float] | None = None
    """Norm of each parameter's change in the step, divided by its norm before; without parameters
    whose norm was 0. None as ``weight_norms``."""
    observed: bool | None = None
    """True if clipping is only observed: the gradients stayed as they were, and the norm afterwards
    is the one that clipping would have given. None if it is carried out."""
