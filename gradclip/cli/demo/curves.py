"""What one run of the demo leaves behind: its curves, with the numbers that sum them up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LAST = 10
"""Steps whose mean is the final loss."""


@dataclass(slots=True)
class Curves:
    """Loss and norm at every step of a run, and what the clipper counted."""

    run: str
    """Name of the run, also of its folder."""
    clips: bool
    """Whether gradients were clipped, or only observed."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    """Norms before clipping."""
    clip_rate: float = 0.0
    """Share of the finite norms above the threshold."""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        """What a reader calls the run."""
        return "with clipping" if self.clips else "without clipping"

    @property
    def final_loss(self) -> float:
        """Mean of the last losses; NaN if one of them is."""
        last = self.losses[-LAST:]
        return sum(last) / len(last)

    @property
    def largest_norm(self) -> float:
        """The largest finite norm; NaN if there is none."""
        return max((norm for norm in self.norms if math.isfinite(norm)), default=math.nan)

    @property
    def nonfinite_norms(self) -> int:
        """How many norms were NaN or infinite."""
        return sum(not math.isfinite(norm) for norm in self.norms)

    @property
    def steps_per_second(self) -> float:
        """Steps per second of training, logging included."""
        return len(self.losses) / self.seconds
