"""Explosions: the norms before one, and the threshold that stops it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..records.norm_history import WINDOW
from .averages import median
from .fitting import rounded_up
from .summary import Summary

EXPLODED = 100.0
"""Norms that stay above this multiple of the early median are an explosion."""
ENORMOUS = 1e4
"""A single norm above this multiple of the median is an explosion."""


def before_explosion(norms: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """Return the finite norms before an explosion.

    An explosion is a norm after which most norms are not finite or many times as high as the early
    ones. A single spike is none.

    Args:
        norms: The norms of a run, one of them finite and above 0.

    Returns:
        The norms before the explosion, all above 0, and whether there was one.
    """
    nonzero = norms[norms != 0]
    finite = np.isfinite(nonzero)
    finite_norms = nonzero[finite]
    early = max(len(finite_norms) // 20, 1)
    # Denormal norms are as good as 0: a multiple of them is not an explosion.
    level = max(median(finite_norms[:early]), np.finfo(np.float64).tiny)
    high = ~finite | (nonzero > EXPLODED * level)
    high_from_here_on = np.cumsum(high[::-1])[::-1] / np.arange(len(nonzero), 0, -1)
    explosions = np.flatnonzero(high & (high_from_here_on > 0.5))
    if not len(explosions):
        return finite_norms, False
    before = int(finite[: explosions[0]].sum())
    return finite_norms[: max(before, 1)], True


def against_explosion(
    calm: NDArray[np.float64], summary: Summary, *, exploded: bool
) -> tuple[float, str]:
    """Return the number that stops an explosion, and the reason to follow the norms instead.

    Args:
        calm: The norms before the explosion.
        summary: The facts of the run.
        exploded: True if norms rose for good, False if only single ones were enormous or NaN.
    """
    finding = f"Norms reached {summary.largest:.3g}"
    if summary.nonfinite_steps:
        finding = f"Norms that were not finite: {summary.nonfinite_steps}"
    finding += (
        '. "auto" follows the level of the norms, slowly upwards, and needs no number; steps with '
        "NaN are skipped."
    )
    if exploded and len(calm) < WINDOW:
        # Few steps before a rise may be part of it: their median would be too high.
        smallest = float(np.percentile(calm, 10, method="lower"))
        threshold = rounded_up(smallest / 2)
        reason = (
            f"{finding} Only {len(calm)} normal steps came before: too few to know the usual norm, "
            "and the last of them may belong to the explosion. The number that would do instead is "
            f"{threshold:g}, half of their 10 % quantile: it clips nearly every step."
        )
    else:
        level = median(calm)
        threshold = rounded_up(2 * level)
        reason = (
            f"{finding} The median norm of the normal steps was {level:.3g}. The number that would "
            f"do instead is twice that, {threshold:g}: it clips few of them and stops the "
            "explosion."
        )
    reason += " If the loss does not fall with either, the learning rate is too high."
    return threshold, reason
