"""The level part of a run whose norms fall at its beginning only, as they do in a warm-up."""

from __future__ import annotations

import numpy as np

from ..records.norm_history import WINDOW
from .averages import median
from .run import Run
from .summary import trend

BEGINNINGS = np.linspace(0.05, 0.5, 10)
"""Shares of a run that a warm-up may take: norms that are level for less than half of it may as
well go on falling."""
LEVEL = 1.25
"""Ratio of medians up to which norms are level. Of norms that fall like the root of the step, the
second half is not."""


def after_warm_up(run: Run) -> Run | None:
    """Return the steps from which on the norms are level; None if they never are.

    Args:
        run: A run whose norms fall.
    """
    for share in BEGINNINGS:
        first = round(share * len(run))
        rest = run.since(first)
        norms = rest.norms[rest.finite & (rest.norms > 0)]
        if len(norms) < WINDOW:
            return None
        # The trend compares quarters, in the first of which the end of a fall would drown.
        begun = median(norms[: max(len(norms) // 20, 10)]) / median(norms)
        if begun < LEVEL and 1 / LEVEL < trend(norms) < LEVEL:
            return rest
    return None
