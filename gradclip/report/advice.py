"""The threshold to choose for the next run, judged from the norms of a logged run."""

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
"""Norms that stay above this multiple of the early median are an explosion."""
ENORMOUS = 1e4
"""A single norm above this multiple of the median is an explosion."""
DRIFTED = 2.0
"""Factor between the first and the last level from which one threshold does not fit both."""
FEW_STEPS = 200
"""Runs with fewer steps get a warning: their advice is not reliable."""
MOSTLY = 0.95
"""Share of clipped steps from which a threshold is said to clip nearly all."""


@dataclass(frozen=True)
class Advice:
    """A threshold for the next run, and the reason for it."""

    kind: str
    """Kind of run: "quiet", "spiky", "drifting", "exploding" or "unknown"."""
    threshold: float | None
    """The advised threshold; None where no number fits the run."""
    line: str
    """A line of code that makes the clipper."""
    reason: str
    usual: float
    """Mean of the norms up to the spike line."""
    shares: dict[float, float]
    """Share of the finite norms that each of some thresholds would have clipped."""
    warnings: tuple[str, ...]


def _reason_without_norms(run: Run) -> str:
    if run.nonfinite_steps:
        return "No norm was finite and above 0: first find the parameters that cause this."
    return (
        "Every norm was 0: no parameter had a gradient, or all gradients were 0. Give the "
        "optimizer the parameters that are trained, those with requires_grad=True, and call "
        "backward() before step()."
    )


def advised(run: Run, summary: Summary) -> Advice:
    """Return the advice for a run."""
    norms = run.norms[run.finite]
    warnings = _warnings(run, summary)
    if not (norms > 0).any():
        return Advice(
            "unknown",
            None,
            'GradientClipper(optimizer, None, nonfinite="raise", model=model)',
            _reason_without_norms(run),
            math.nan,
            {},
            warnings,
        )
    usual = float(norms[norms <= summary.spike_line].mean(dtype=np.longdouble))
    kind, threshold, reason = _judged(run, summary)
    candidates = {_rounded_up(usual * factor) for factor in (0.5, 1, 2, 5, 10)}
    candidates |= {_rounded_up(summary.quantiles[percent]) for percent in (90.0, 99.0, 99.9)}
    shares = {limit: float((norms > limit).mean()) for limit in sorted(candidates) if limit > 0}
    return Advice(kind, threshold, _line(kind, threshold), reason, usual, shares, warnings)


def _line(kind: str, threshold: float | None) -> str:
    if threshold is None:
        return "GradientClipper(optimizer, gradclip.thresholds.MedianDeviation(10))"
    skip = ', nonfinite="skip"' if kind == "exploding" else ""
    return f"GradientClipper(optimizer, {threshold:g}{skip})"


def _judged(run: Run, summary: Summary) -> tuple[str, float | None, str]:
    """Return the kind of a run, the threshold if a number fits, and the reason."""
    calm, exploded = _before_explosion(run.norms)
    level = float(np.median(calm))
    if summary.nonfinite_steps or exploded or summary.largest > ENORMOUS * level:
        return "exploding", *_against_explosion(calm, summary, exploded=exploded)
    if not 1 / DRIFTED < summary.trend < DRIFTED and not math.isnan(summary.trend):
        return "drifting", None, _reason_for_drift(summary)
    threshold = _rounded_up(summary.spike_line)
    if summary.spikes and summary.largest > threshold:
        share = float((run.norms[run.finite] > threshold).mean())
        return "spiky", threshold, _reason_for_spikes(summary, threshold, share)
    threshold = _rounded_up(max(2 * summary.quantiles[99.9], summary.largest))
    return "quiet", threshold, _reason_for_quiet(summary, threshold)


def _reason_for_drift(summary: Summary) -> str:
    reason = (
        f"The median norm of the last quarter is {summary.trend:.2g} times that of the first: a "
        "fixed threshold that fits the beginning does not fit the end. This rule follows the last "
        f"{WINDOW} norms and clips a norm far above them."
    )
    if summary.spikes and summary.trend > 1:
        reason += " The spikes of this run may have caused the drift."
    return reason


def _reason_for_spikes(summary: Summary, threshold: float, share: float) -> str:
    spike = summary.largest_spikes[0]
    return (
        f"Norms far above the {WINDOW} before them: {summary.spikes}, the highest at "
        f"{spike.norm / spike.usual:.3g} times their median. {threshold:g} is the median of all "
        f"norms plus {DEVIATIONS:g} median deviations: it would have clipped {share:.2%} of the "
        "steps."
    )


def _reason_for_quiet(summary: Summary, threshold: float) -> str:
    usual = "the norms before it or the usual norm" if summary.spikes else "the norms before it"
    finding = f"Nothing needs clipping: no norm was far above {usual}."
    if summary.clip_rate > 0:
        finding = (
            f"No norm was far above {usual}. But this training clipped {summary.clip_rate:.2%} of "
            "its steps; without clipping its norms may be larger."
        )
    return (
        f"{finding} {threshold:g} is the largest norm, or twice the 99.9 % quantile if that is "
        "larger: a safeguard that clips no step of a run like this one."
    )


def _against_explosion(
    calm: NDArray[np.float64], summary: Summary, *, exploded: bool
) -> tuple[float, str]:
    """Return the threshold that stops an explosion, and the reason.

    Args:
        calm: The norms before the explosion.
        summary: The facts of the run.
        exploded: True if norms rose for good, False if only single ones were enormous or NaN.
    """
    finding = f"Norms reached {summary.largest:.3g}"
    if summary.nonfinite_steps:
        finding = f"Norms that were not finite: {summary.nonfinite_steps}"
    if exploded and len(calm) < WINDOW:
        # Few steps before a rise may be part of it: their median would be too high.
        smallest = float(np.percentile(calm, 10, method="lower"))
        threshold = _rounded_up(smallest / 2)
        reason = (
            f"{finding}. Only {len(calm)} normal steps came before: too few to know the usual "
            f"norm, and the last of them may belong to the explosion. {threshold:g} is half of "
            "their 10 % quantile and clips nearly every step."
        )
    else:
        level = float(np.median(calm))
        threshold = _rounded_up(2 * level)
        reason = (
            f"{finding}. The median norm of the normal steps was {level:.3g}. Twice that clips few "
            "of them and stops the explosion; steps with NaN are skipped."
        )
    reason += " If the loss does not fall with this threshold, the learning rate is too high."
    return threshold, reason


def _before_explosion(norms: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """Return the finite norms before an explosion.

    An explosion is a norm after which most norms are not finite or many times as high as the early
    ones. A single spike is none.

    Returns:
        The norms before the explosion, all above 0, and whether there was one.
    """
    nonzero = norms[norms != 0]
    finite = np.isfinite(nonzero)
    finite_norms = nonzero[finite]
    early = max(len(finite_norms) // 20, 1)
    # Denormal norms are as good as 0: a multiple of them is not an explosion.
    level = max(float(np.median(finite_norms[:early])), np.finfo(np.float64).tiny)
    high = ~finite | (nonzero > EXPLODED * level)
    high_from_here_on = np.cumsum(high[::-1])[::-1] / np.arange(len(nonzero), 0, -1)
    explosions = np.flatnonzero(high & (high_from_here_on > 0.5))
    if not len(explosions):
        return finite_norms, False
    before = int(finite[: explosions[0]].sum())
    return finite_norms[: max(before, 1)], True


def _warnings(run: Run, summary: Summary) -> tuple[str, ...]:
    warnings = []
    if summary.steps < FEW_STEPS:
        warnings.append(f"Only {summary.steps} steps were logged: too few for reliable advice.")
    if not np.isnan(run.thresholds).all():
        if summary.clip_rate == 0:
            warnings.append("The threshold of this run never clipped: it was at most a safeguard.")
        elif summary.clip_rate >= MOSTLY:
            warnings.append(
                f"The threshold of this run clipped {summary.clip_rate:.0%} of the steps: nearly "
                "all updates used the same norm, so the learning rate alone set their length."
            )
    losses = summary.losses
    if losses is not None and losses.spikes:
        warnings.append(
            f"Losses that spiked: {losses.spikes:,}, {losses.spike_rate:.2%} of them. "
            "GradientClipper(optimizer, gradclip.thresholds.MeanDeviation(6, loss=True), "
            'exceed="skip"), with clipper.loss = loss before each step, skips such steps.'
        )
    return tuple(warnings)


def _rounded_up(value: float) -> float:
    """Return a number rounded up to two digits, above 0 and finite."""
    # `:.12g` first: a rounding error in the last bit must not move 2.4 to 2.5.
    rounded = Context(prec=2, rounding=ROUND_CEILING).create_decimal(f"{value:.12g}")
    return min(max(float(rounded), math.ulp(0.0)), 1e308)
