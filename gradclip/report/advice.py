"""The threshold to choose for the next run, judged from the norms of a logged run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .averages import mean
from .confidence import SELDOM, Confidence, confidence_in
from .fitting import rounded_up
from .kinds import judged
from .run import Run
from .summary import Summary

MOSTLY = 0.95
"""Share of clipped steps from which a threshold is said to clip nearly all."""


@dataclass(frozen=True)
class Advice:
    """A threshold for the next run, and the reason for it."""

    kind: str
    """Kind of run: "quiet", "spiky", "drifting", "exploding", "short" for too few steps to say, or
    "unknown" without a norm above 0."""
    threshold: float | None
    """The number that would do; None where no number fits the run."""
    max_norm: float | str | None
    """What the line gives the clipper: the threshold, "auto" where following the norms is better
    than that, None to observe only."""
    line: str
    """A line of code that makes the clipper."""
    reason: str
    confidence: Confidence
    """How sure the advice is, and why."""
    usual: float
    """Mean of the norms up to the spike line."""
    shares: dict[float, float]
    """Share of the finite norms that each of some thresholds would have clipped."""
    warnings: tuple[str, ...]


def _reason_without_norms(run: Run) -> tuple[str, str]:
    """Return what to do about a run without a norm above 0, and what makes that sure."""
    if run.nonfinite_steps:
        return (
            "No norm was finite and above 0: first find the parameters that cause this.",
            "No step had a norm to judge by.",
        )
    reason = (
        "Every norm was 0: no parameter had a gradient, or all gradients were 0. Give the "
        "optimizer the parameters that are trained, those with requires_grad=True, and call "
        "backward() before step()."
    )
    return reason, "The fault is sure; norms of 0 say nothing about a threshold."


def advised(run: Run, summary: Summary) -> Advice:
    """Return the advice for a run."""
    norms = run.norms[run.finite]
    warnings = _warnings(run, summary)
    if not (norms > 0).any():
        reason, certainty = _reason_without_norms(run)
        return Advice(
            "unknown",
            None,
            None,
            'GradientClipper(optimizer, None, nonfinite="raise", model=model)',
            reason,
            Confidence("high", certainty),
            math.nan,
            {},
            warnings,
        )
    usual = mean(norms[norms <= summary.spike_line])
    judgement = judged(run, summary)
    if judgement.exploded and run.changed > SELDOM:
        warnings += (_warning_of_rate(run),)
    candidates = {rounded_up(usual * factor) for factor in (0.5, 1, 2, 5, 10)}
    candidates |= {rounded_up(summary.quantiles[percent]) for percent in (90.0, 99.0, 99.9)}
    shares = {limit: float((norms > limit).mean()) for limit in sorted(candidates) if limit > 0}
    return Advice(
        judgement.kind,
        judgement.threshold,
        judgement.max_norm,
        _line(judgement.kind, judgement.max_norm),
        judgement.reason,
        confidence_in(judgement, run),
        usual,
        shares,
        warnings,
    )


def _line(kind: str, max_norm: float | str | None) -> str:
    argument = '"auto"' if max_norm == "auto" else f"{max_norm:g}"
    skip = ', nonfinite="skip"' if kind == "exploding" else ""
    return f"GradientClipper(optimizer, {argument}{skip})"


def _warning_of_rate(run: Run) -> str:
    """Return what to do about norms that rose for good while they were clipped."""
    return (
        f"Norms exploded though {run.changed:.2%} of them were clipped: this threshold did "
        "not stop it. Lower the learning rate, or take a threshold far below the usual norms."
    )


def _warnings(run: Run, summary: Summary) -> tuple[str, ...]:
    warnings = []
    if run.observed:
        warnings.append(
            f"Clipping was only observed: {summary.clip_rate:.2%} of the steps would have been "
            "clipped, and no gradient was changed."
        )
    elif not np.isnan(run.thresholds).all():
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
