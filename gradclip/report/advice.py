"""Which threshold to take, from what the norms of a run were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np
from numpy.typing import NDArray

from .run import Run
from .summary import DEVIATIONS, Summary

EXPLODED = 100.0
"""How many times the early median is an explosion."""
ENORMOUS = 1e4
"""How many times the median a single norm is an explosion."""
MOVED = 2.0
"""By what factor a level has to move until one threshold does not fit it."""
FEW = 200
"""Steps that are too few to judge by."""
MOSTLY = 0.95
"""Share of clipped steps that is nearly all."""


@dataclass(frozen=True)
class Advice:
    """A threshold to take, and why."""

    kind: str
    """What kind of run it is: "quiet", "spiky", "drifting", "exploding", or "unknown"."""
    line: str
    """A line of code."""
    reason: str
    usual: float
    """Mean of the norms that are no outliers."""
    shares: dict[float, float]
    """Thresholds, and the share of the finite norms that each would have clipped."""
    warnings: tuple[str, ...]


def advised(run: Run, summary: Summary) -> Advice:
    """Return what to do after a run."""
    norms = run.norms[run.finite]
    warnings = _warnings(run, summary)
    if not (norms > 0).any():
        return Advice(
            "unknown",
            'GradientClipper(optimizer, None, nonfinite="raise", model=model)',
            "No norm was finite and above 0: find out which parameters are to blame first.",
            math.nan,
            {},
            warnings,
        )
    usual = float(norms[norms <= summary.spike_line].mean(dtype=np.longdouble))
    kind, line, reason = _judged(norms, summary)
    candidates = {_rounded(usual * factor) for factor in (0.5, 1, 2, 5, 10)}
    candidates |= {_rounded(summary.quantiles[percent]) for percent in (90.0, 99.0, 99.9)}
    shares = {limit: float((norms > limit).mean()) for limit in sorted(candidates) if limit > 0}
    return Advice(kind, line, reason, usual, shares, warnings)


def _judged(norms: NDArray[np.float64], summary: Summary) -> tuple[str, str, str]:
    """Return the kind of a run, a line of code, and the reason."""
    moving = norms[norms > 0]
    calm = _calm(moving)
    level = float(np.median(calm))
    if summary.nonfinite_steps or len(calm) < len(moving) or summary.largest > ENORMOUS * level:
        limit = _rounded(2 * level)
        count = summary.nonfinite_steps
        what = f"{count} norms were not finite" if count else f"Norms reached {summary.largest:.3g}"
        line = f'GradientClipper(optimizer, {limit:g}, nonfinite="skip")'
        reason = (
            f"{what}; the median of calm steps was {level:.3g}. Twice that leaves most of them "
            "alone and stops the explosion; no step is taken with NaN."
        )
        return "exploding", line, reason
    if not 1 / MOVED < summary.trend < MOVED and not math.isnan(summary.trend):
        line = "GradientClipper(optimizer, gradclip.thresholds.MedianDeviation(10))"
        reason = (
            f"The median moved to {summary.trend:.2g} times what it was: a fixed threshold that "
            "fits the beginning does not fit the end. This one follows the last 100 norms, and "
            "clips what is far above them."
        )
        return "drifting", line, reason
    if summary.spikes:
        limit = _rounded(summary.spike_line)
        share = float((norms > limit).mean())
        line = f"GradientClipper(optimizer, {limit:g})"
        reason = (
            f"{summary.spikes} norms were far above the hundred before them, the largest "
            f"{summary.largest:.3g}. {limit:g} is the median of all and {DEVIATIONS:g} median "
            f"deviations: it would have clipped {share:.2%} of the steps."
        )
        return "spiky", line, reason
    limit = _rounded(max(2 * summary.quantiles[99.9], summary.largest))
    line = f"GradientClipper(optimizer, {limit:g})"
    reason = (
        f"Nothing needs clipping: no norm was far above those before it. {limit:g} is twice the "
        "99.9 % quantile, or the largest norm: an insurance that changes no step of a run like "
        "this one."
    )
    return "quiet", line, reason


def _calm(norms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the norms before they rise for good to many times what they were."""
    early = max(len(norms) // 20, 1)
    limit = EXPLODED * max(float(np.median(norms[:early])), np.finfo(np.float64).tiny)
    high = norms > limit
    # For good: most of what comes later is as high.
    later = np.cumsum(high[::-1])[::-1] / np.arange(len(norms), 0, -1)
    risen = np.flatnonzero(high & (later > 0.5))
    return norms[: max(int(risen[0]), 1)] if len(risen) else norms


def _warnings(run: Run, summary: Summary) -> tuple[str, ...]:
    found = []
    if summary.steps < FEW:
        found.append(f"Only {summary.steps} steps were logged: little to judge by.")
    if not np.isnan(run.thresholds).all():
        if summary.clip_rate == 0:
            found.append("The threshold of this run never clipped: it was an insurance at most.")
        elif summary.clip_rate >= MOSTLY:
            found.append(
                f"The threshold of this run clipped {summary.clip_rate:.0%} of the steps: nearly "
                "all had the same norm, so that only the learning rate decided on their length."
            )
    return tuple(found)


def _rounded(value: float) -> float:
    """Return the next number above with two digits."""
    rounded = Context(prec=2, rounding=ROUND_CEILING).create_decimal(f"{value:.12g}")
    return min(float(rounded), 1e308)
