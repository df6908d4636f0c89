"""How sure the advice for a run is, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .explosion import before_explosion
from .fitting import safeguard
from .kinds import FEW_STEPS, HIGH, Judgement
from .run import Run

ALIKE = 1.25
"""Ratio up to which two thresholds are as good as the same."""
APART = 2.0
"""Ratio from which two thresholds are so different that neither is known."""
FEW_SPIKES = 3
"""Fewer spikes are a finding only if one of them is high."""
SELDOM = 0.05
"""Share of clipped steps up to which a training is as good as not clipped."""
LONG = 1000
"""Steps in which a warm-up is over: norms that fall for longer drift."""


@dataclass(frozen=True)
class Confidence:
    """How sure an advice is."""

    level: str
    """"high", "medium" or "low"."""
    reason: str


def confidence_in(judgement: Judgement, run: Run) -> Confidence:
    """Return how sure the judgement of a run is: as sure as its gravest doubt allows.

    Args:
        judgement: The judgement.
        run: The whole run.
    """
    doubts = [*_doubts(judgement, run)]
    if not doubts:
        return Confidence("high", _evidence(judgement))
    gravest = "low" if any(level == "low" for level, _ in doubts) else "medium"
    return Confidence(gravest, " ".join(doubt for level, doubt in doubts if level == gravest))


def _doubts(judgement: Judgement, run: Run) -> Iterator[tuple[str, str]]:
    """Yield the reasons not to be sure, each with the confidence that it leaves."""
    kind, summary = judgement.kind, judgement.summary
    calm = len(before_explosion(judgement.run.norms)[0])
    if judgement.exploded and calm < FEW_STEPS:
        yield "low", f"Only {_steps(calm)} came before the explosion."
    elif calm < FEW_STEPS:
        yield "low", f"These are only {_steps(calm)}: log {FEW_STEPS} or more."
    elif judgement.exploded:
        yield "medium", "Only a training with it shows whether the explosion stops."
    if kind == "drifting" and summary.trend < 1 and len(run) < LONG:
        steps = _steps(len(run))
        yield "medium", f"Norms that fell for {steps} may be those of a warm-up that is not over."
    if kind == "spiky" and summary.spikes < FEW_SPIKES and summary.highest_spike < HIGH:
        norms = f"{summary.spikes} norm{'s' * (summary.spikes != 1)}"
        yield "medium", f"It rests on {norms}, less than {HIGH:g} times the median before."
    if kind == "quiet":
        smaller, larger = sorted(_of_halves(judgement))
        if larger > ALIKE * smaller:
            yield "low" if larger > APART * smaller else "medium", _comparison(judgement)
    if math.isnan(run.changed):
        yield "medium", "The log does not say which steps were clipped."
    elif run.changed > SELDOM:
        share = f"{run.changed:.2%} of the steps"
        yield "medium", f"This run clipped {share}: without, its norms may differ."


def _evidence(judgement: Judgement) -> str:
    if judgement.kind == "quiet":
        return _comparison(judgement)
    return f"{_steps(len(judgement.run))} show it."


def _comparison(judgement: Judgement) -> str:
    one, other = _of_halves(judgement)
    return (
        f"The first half of the {_steps(len(judgement.run))} alone would give the threshold "
        f"{one:g}, the second {other:g}."
    )


def _of_halves(judgement: Judgement) -> tuple[float, float]:
    """Return the safeguards that either half of the steps would give."""
    norms = judgement.run.norms[judgement.run.finite & (judgement.run.norms > 0)]
    middle = len(norms) // 2
    return safeguard(norms[:middle]), safeguard(norms[middle:])


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"
