"""The kind of a run, such as quiet or spiky, and the threshold that suits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..records.norm_history import DEVIATIONS, WINDOW
from .averages import median
from .explosion import ENORMOUS, against_explosion, before_explosion
from .fitting import rounded_up, safeguard, spike_threshold
from .run import Run
from .summary import Summary, summarized
from .warm_up import after_warm_up

DRIFTED = 2.0
"""Factor between the first and the last level from which one threshold does not fit both."""
FEW_STEPS = 200
"""With fewer norms a run is neither quiet nor drifting, and spiky only by norms that are `HIGH`."""
HIGH = 10.0
"""A norm this many times the usual one is a spike however few steps there are: the upper end of the
thresholds that Pascanu (2013) found to work."""
FOLLOWED = ("drifting", "spiky", "exploding")
"""Kinds of runs for which "auto" is better than a number: a quiet one needs no clipping, only a
safeguard."""
CLIPPED = 0.01
"""Share of clipped steps from which a run may be quiet because it was clipped."""


@dataclass(frozen=True)
class Judgement:
    """What the norms of a run are like, and what follows from it."""

    kind: str
    """"quiet", "spiky", "drifting", "exploding" or "short"."""
    threshold: float | None
    """The number that would do; None where no number fits."""
    reason: str
    run: Run
    """The steps that were judged: those after a warm-up, or all."""
    summary: Summary
    """The facts of these steps."""
    changed: float
    """Share of the norms of the whole run that clipping changed; NaN if it is not known."""
    exploded: bool = False
    """True if norms rose for good, False if only single ones were enormous or NaN."""

    @property
    def max_norm(self) -> float | Literal["auto"] | None:
        """What is advised: the threshold, or "auto" where following the norms is better."""
        quiet_by_clipping = self.kind == "quiet" and self.changed > CLIPPED
        return "auto" if self.kind in FOLLOWED or quiet_by_clipping else self.threshold


def judged(run: Run, summary: Summary) -> Judgement:
    """Return the kind of a run that has a norm above 0, the threshold and the reason."""
    calm, exploded = before_explosion(run.norms)
    level = median(calm)
    if summary.nonfinite_steps or exploded or summary.largest > ENORMOUS * level:
        threshold, reason = against_explosion(calm, summary, exploded=exploded)
        return Judgement("exploding", threshold, reason, run, summary, run.changed, exploded)
    few = len(calm) < FEW_STEPS
    if few and not summary.highest_spike >= HIGH:
        threshold = rounded_up(HIGH * level)
        reason = _reason_for_few(len(calm), summary, threshold)
        return Judgement("short", threshold, reason, run, summary, run.changed)
    if few or 1 / DRIFTED < summary.trend < DRIFTED:
        return Judgement(*_fitted(run, summary, run.changed), run, summary, run.changed)
    settled = after_warm_up(run)
    if settled is None:
        return Judgement("drifting", None, _reason_for_drift(summary), run, summary, run.changed)
    settled_summary = summarized(settled)
    kind, threshold, reason = _fitted(settled, settled_summary, run.changed)
    reason = f"{_warm_up(run, settled, threshold)} {reason}"
    return Judgement(kind, threshold, reason, settled, settled_summary, run.changed)


def _fitted(run: Run, summary: Summary, changed: float) -> tuple[str, float, str]:
    """Return the kind of steps at one level, the threshold and the reason."""
    norms = run.norms[run.finite]
    threshold = spike_threshold(norms)
    if summary.spikes and summary.largest > threshold:
        share = float((norms > threshold).mean())
        return "spiky", threshold, _reason_for_spikes(summary, threshold, share)
    threshold = safeguard(norms)
    return "quiet", threshold, _reason_for_quiet(summary, changed, threshold)


def _warm_up(run: Run, settled: Run, threshold: float) -> str:
    count = len(run) - len(settled)
    before, after = (median(norms[norms > 0]) for norms in (run.norms[:count], settled.norms))
    share = float((run.norms[:count] > threshold).mean())
    return (
        f"The norms fell in the first {count:,} steps, from a median of {before:.3g} there to one "
        f"of {after:.3g} in the {len(settled):,} steps since, which are level: a warm-up and no "
        f"drift. The advice is for the level part; a threshold of {threshold:g} would have clipped "
        f"{share:.2%} of the steps before it."
    )


def _reason_for_few(count: int, summary: Summary, threshold: float) -> str:
    finding = f"{count} norm{'s are' if count != 1 else ' is'} too few to say more"
    if summary.spikes:
        finding += f", though one was {summary.highest_spike:.2g} times the median before it"
    return (
        f"{finding}. {threshold:g} is {HIGH:g} times their median, the upper end of the thresholds "
        "that work (Pascanu 2013): a safeguard until more is known."
    )


def _reason_for_drift(summary: Summary) -> str:
    reason = (
        f"The median norm of the last quarter is {summary.trend:.2g} times that of the first: a "
        'fixed threshold that fits the beginning does not fit the end. "auto" follows the level of '
        "the norms and needs no number."
    )
    if summary.spikes and summary.trend > 1:
        reason += " The spikes of this run may have caused the drift."
    return reason


def _reason_for_spikes(summary: Summary, threshold: float, share: float) -> str:
    return (
        f"Norms far above the {WINDOW} before them: {summary.spikes}, the highest at "
        f'{summary.highest_spike:.3g} times their median. "auto" follows the level of the norms '
        f"and needs no number. The number that would do instead is {threshold:g}, the median of "
        f"all norms plus {DEVIATIONS:g} median deviations: it would have clipped {share:.2%} of "
        "the steps."
    )


def _reason_for_quiet(summary: Summary, changed: float, threshold: float) -> str:
    usual = "the norms before it or the usual norm" if summary.spikes else "the norms before it"
    finding = f"Nothing needs clipping: no norm was far above {usual}."
    if changed > 0:
        finding = (
            f"No norm was far above {usual}. But this training clipped {changed:.2%} of its "
            "steps; without clipping its norms may be larger."
        )
    number = f"{threshold:g} is"
    if changed > CLIPPED:
        finding += ' "auto" goes on limiting them, and needs no number.'
        number = f"The number that would do instead is {threshold:g},"
    return (
        f"{finding} {number} the largest norm, or twice the 99.9 % quantile if that is larger: a "
        "safeguard that clips no step like these."
    )
