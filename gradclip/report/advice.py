"""Which threshold to take, from what the norms of a run were."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context

import numpy as np
from numpy.typing import NDArray

from ..records.norm_history import DEVIATIONS, WINDOW
from .run import Run
from .summary import Summary

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
    threshold: float | None
    """The one to take; None where no number fits."""
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
            None,
            'GradientClipper(optimizer, None, nonfinite="raise", model=model)',
            "No norm was finite and above 0: find out which parameters are to blame first.",
            math.nan,
            {},
            warnings,
        )
    usual = float(norms[norms <= summary.spike_line].mean(dtype=np.longdouble))
    kind, threshold, reason = _judged(run, summary)
    candidates = {_rounded(usual * factor) for factor in (0.5, 1, 2, 5, 10)}
    candidates |= {_rounded(summary.quantiles[percent]) for percent in (90.0, 99.0, 99.9)}
    shares = {limit: float((norms > limit).mean()) for limit in sorted(candidates) if limit > 0}
    line = _line(kind, threshold)
    return Advice(kind, threshold, line, reason, usual, shares, warnings)


def _line(kind: str, threshold: float | None) -> str:
    if threshold is None:
        return "GradientClipper(optimizer, gradclip.thresholds.MedianDeviation(10))"
    skip = ', nonfinite="skip"' if kind == "exploding" else ""
    return f"GradientClipper(optimizer, {threshold:g}{skip})"


def _judged(run: Run, summary: Summary) -> tuple[str, float | None, str]:
    """Return the kind of a run, the threshold to take if a number fits, and the reason."""
    calm, risen = _calm(run.norms)
    level = float(np.median(calm))
    if summary.nonfinite_steps or risen or summary.largest > ENORMOUS * level:
        return "exploding", *_against_explosion(calm, summary, risen=risen)
    if not 1 / MOVED < summary.trend < MOVED and not math.isnan(summary.trend):
        reason = (
            f"The median moved to {summary.trend:.2g} times what it was: a fixed threshold that "
            "fits the beginning does not fit the end. This one follows the last 100 norms, and "
            "clips what is far above them."
        )
        if summary.spikes and summary.trend > 1:
            reason += " The spikes of this run may be what moved it."
        return "drifting", None, reason
    limit = _rounded(summary.spike_line)
    if summary.spikes and summary.largest > limit:
        share = float((run.norms[run.finite] > limit).mean())
        spike = summary.largest_spikes[0]
        reason = (
            f"Norms far above the hundred before them: {summary.spikes}, up to "
            f"{spike.norm / spike.usual:.3g} times their median. {limit:g} is the median of all "
            f"and {DEVIATIONS:g} median deviations: it would have clipped {share:.2%} of the steps."
        )
        return "spiky", limit, reason
    limit = _rounded(max(2 * summary.quantiles[99.9], summary.largest))
    far = "those before it and the usual ones" if summary.spikes else "those before it"
    if summary.clip_rate:
        found = (
            f"No norm was far above {far}, in a training that clipped {summary.clip_rate:.2%} of "
            "its steps; without that they may be larger."
        )
    else:
        found = f"Nothing needs clipping: no norm was far above {far}."
    reason = (
        f"{found} {limit:g} is twice the 99.9 % quantile, or the largest norm: an insurance that "
        "clips no step of a run like this one."
    )
    return "quiet", limit, reason


def _against_explosion(
    calm: NDArray[np.float64], summary: Summary, *, risen: bool
) -> tuple[float, str]:
    """Return the threshold to take and the reason."""
    count = summary.nonfinite_steps
    what = f"Norms reached {summary.largest:.3g}"
    if count:
        what = f"Norms that were not finite: {count}"
    if risen and len(calm) < WINDOW:
        smallest = float(np.percentile(calm, 10, method="lower"))
        limit = _rounded(smallest / 2)
        reason = (
            f"{what}; only {len(calm)} calm steps came before, too few to know a level, and the "
            f"later ones may be part of the rise. {limit:g} is half of their 10 % quantile, and "
            "clips nearly all steps."
        )
    else:
        level = float(np.median(calm))
        limit = _rounded(2 * level)
        reason = (
            f"{what}; the median of calm steps was {level:.3g}. Twice that leaves most of them "
            "alone and stops the explosion; no step is taken with NaN."
        )
    reason += " Where the loss does not fall with it, the learning rate is too high."
    return limit, reason


def _calm(norms: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """Return the finite norms before they rise for good to many times what they were.

    Returns:
        Those norms, all above 0, and whether there was such a rise.
    """
    known = norms[norms != 0]
    finite = np.isfinite(known)
    moving = known[finite]
    early = max(len(moving) // 20, 1)
    limit = EXPLODED * max(float(np.median(moving[:early])), np.finfo(np.float64).tiny)
    high = ~finite | (known > limit)
    # For good: most of what comes later is as high.
    later = np.cumsum(high[::-1])[::-1] / np.arange(len(known), 0, -1)
    risen = np.flatnonzero(high & (later > 0.5))
    if not len(risen):
        return moving, False
    before = int(finite[: risen[0]].sum())
    return moving[: max(before, 1)], True


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
    """Return the next number above with two digits, and above 0."""
    rounded = Context(prec=2, rounding=ROUND_CEILING).create_decimal(f"{value:.12g}")
    return min(max(float(rounded), math.ulp(0.0)), 1e308)
