"""Results of both arms: intervals, paired tests, Markdown and a picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.markdown import table
from benchmarks.experiments.temporal_order.training import (
    ARMS,
    LARGEST_ERROR,
    TEST,
    VALIDATION,
    Arm,
    Pair,
    Plan,
)

LEVEL = 0.05
NEVER = math.inf
_ALLOWED = f"{100 * LARGEST_ERROR:g} %"
DEFINITION = (
    f"A seed solves the task if it classifies less than {_ALLOWED} of {TEST:,} fresh sequences "
    f"wrongly. This is tested at each check with at most {_ALLOWED} of {VALIDATION} sequences "
    "wrong, until the seed succeeds once, and for all seeds after the last update. A seed that "
    "diverges, with a parameter that is not finite, fails."
)
ABOUT_RATES = (
    "Intervals are Wilson's; the median update is that of the seeds that solved the task. In the "
    "clipped arm, a norm that is not finite sets the gradients of its own seed to 0. In the "
    "unclipped arm norms are only measured and nothing is written."
)
ABOUT_COMPARISONS = (
    "Seed by seed: both arms start with the same weights and see the same sequences. p is "
    "two-sided, by McNemar's exact test, which is the sign test of the seeds that differ. Only "
    f"success is judged, at {LEVEL:g} divided by the number of lengths; the other rows are for "
    "information."
)


@dataclass(frozen=True)
class Outcome:
    """The results of one arm; lists have an entry for each seed."""

    solved_at: list[int | None]
    """Number of updates until success; None without success."""
    diverged_at: list[int | None]
    """Updates at the first check with a parameter that was not finite; None without one."""
    final_errors: list[float]
    """Shares of wrongly classified sequences after the last update."""
    clip_rate: float
    """Share of the norms above the threshold."""
    largest_norms: list[float]
    """Largest norms before clipping."""
    validation_errors: list[list[float]]
    """Shares of wrongly classified sequences at every check."""

    @classmethod
    def of(cls, arm: Arm) -> Outcome:
        """Return the results of an arm after a final test."""
        return cls(
            arm.solved_at,
            arm.diverged_at,
            arm.final_errors(),
            arm.clipper.clip_rate(),
            arm.largest_norms.tolist(),
            arm.validation_errors,
        )

    @property
    def successes(self) -> list[bool]:
        """True for each seed that solved the task at some check and never diverged."""
        pairs = zip(self.solved_at, self.diverged_at, strict=True)
        return [solved is not None and diverged is None for solved, diverged in pairs]

    @property
    def last_successes(self) -> list[bool]:
        """True for each seed that solves the task after the last update."""
        return [error < LARGEST_ERROR for error in self.final_errors]

    @property
    def times(self) -> list[float]:
        """Number of updates until each seed solved the task; infinity without success."""
        pairs = zip(self.solved_at, self.successes, strict=True)
        return [at if at is not None and success else NEVER for at, success in pairs]


@dataclass(frozen=True)
class Result:
    """The results of both arms for one length."""

    plan: Plan
    updates: int
    seconds: float
    arms: dict[str, Outcome]

    @classmethod
    def of(cls, pair: Pair) -> Result:
        """Return the results of both arms after a final test."""
        outcomes = {name: Outcome.of(arm) for name, arm in pair.arms.items()}
        return cls(pair.plan, pair.updates, pair.seconds, outcomes)


@dataclass(frozen=True)
class Comparison:
    """Number of seeds in which each arm did better than the other, from the same start."""

    clipped: int
    unclipped: int
    alike: int

    @classmethod
    def of(cls, result: Result, outcome: str) -> Comparison:
        """Return the comparison by one of `OUTCOMES`."""
        better = OUTCOMES[outcome]
        clipped, unclipped = (
            [-value if better == "less" else value for value in getattr(result.arms[name], outcome)]
            for name in ARMS
        )
        pairs = [*zip(clipped, unclipped, strict=True)]
        first, second = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        return cls(first, second, len(pairs) - first - second)

    @property
    def p_value(self) -> float:
        """Two-sided p of McNemar's exact test, the sign test of the seeds that differ."""
        return sign_test(self.clipped, self.unclipped)


OUTCOMES = {"successes": "more", "times": "less", "last_successes": "more"}
"""Attributes by which the arms are compared, and whether more or less is better."""
TITLES = {
    "successes": "solved it",
    "times": "solved it first",
    "last_successes": "solves it at the end",
}


def wilson(successes: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval for a rate, which misses the rate with probability ``level``."""
    z = statistics.NormalDist().inv_cdf(1 - level / 2)
    share, scale = successes / count, 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided probability of a split at least as uneven as this by chance.

    With the two counts of discordant pairs this is McNemar's exact test.
    """
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, math.ldexp(tail, 1 - count))


def rates(results: list[Result]) -> list[str]:
    """Return the results of each arm as a Markdown table."""
    names = [
        "L",
        "arm",
        "solved",
        "95 % interval",
        "median update of success",
        "solves it at the end",
        "median error at the end",
        "diverged",
        "norms above the threshold",
        "largest norm",
    ]
    lines = [
        [str(result.plan.length), name, *_cells(result.arms[name])]
        for result in results
        for name in ARMS
    ]
    return table(names, lines)


def _cells(arm: Outcome) -> list[str]:
    count, successes = len(arm.successes), sum(arm.successes)
    low, high = wilson(successes, count)
    times = [time for time in arm.times if time < NEVER]
    return [
        f"{successes}/{count}",
        f"{low:.2f} to {high:.2f}",
        f"{statistics.median(times):,.0f}" if times else "none",
        f"{sum(arm.last_successes)}/{count}",
        f"{statistics.median(arm.final_errors):.4f}",
        str(sum(at is not None for at in arm.diverged_at)),
        f"{100 * arm.clip_rate:.1f} %",
        f"{max(arm.largest_norms):.3g}",
    ]


def comparisons(results: list[Result]) -> list[str]:
    """Return the comparison of the arms seed by seed as a Markdown table."""
    lines = [
        "| L | which arm | clipped alone | unclipped alone | no difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for outcome, title in TITLES.items():
        for result in results:
            comparison = Comparison.of(result, outcome)
            counts = f"{comparison.clipped} | {comparison.unclipped} | {comparison.alike}"
            lines.append(
                f"| {result.plan.length} | {title} | {counts} | {comparison.p_value:.2g} |"
            )
    return lines


def verdicts(results: list[Result], updates: int, minutes: float) -> list[str]:
    """Return for each length why it ended and whether success rates separate the arms."""
    level = LEVEL / len(results)
    lines = []
    for result in results:
        comparison, count = Comparison.of(result, "successes"), result.plan.seeds
        clipped, unclipped = (sum(result.arms[name].successes) for name in ARMS)
        if result.updates >= updates:
            ended = "the budget of updates ended it"
        elif result.seconds >= 60 * minutes:
            ended = f"the wall time ended it before {updates:,} updates"
        else:
            ended = "it was interrupted"
        lines.append(
            f"- **L = {result.plan.length}**: {result.updates:,} updates of each arm in "
            f"{result.seconds / 60:.1f} minutes; {ended}. Clipped, {clipped} of {count} seeds "
            f"solved the task, unclipped {unclipped}. {_separation(comparison, level)}"
        )
    return lines


def _separation(comparison: Comparison, level: float) -> str:
    test = f"(p = {comparison.p_value:.2g}, level {level:.3g})"
    if comparison.p_value >= level:
        return f"Within this budget success rates do not separate the arms {test}."
    if comparison.clipped > comparison.unclipped:
        return f"Clipped seeds succeed more often {test}."
    return f"Unclipped seeds succeed more often {test}."


def draw(results: list[Result], path: Path) -> None:
    """Draw the share of seeds that solved the task, and the errors, at every check."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 6), layout="constrained")
    axes = figure.subplots(2, len(results), sharex="col", sharey="row", squeeze=False)
    for column, result in enumerate(results):
        step = result.plan.check_every
        checks = range(step, result.updates + 1, step)
        for name, colour in zip(ARMS, ("tab:blue", "tab:orange"), strict=True):
            arm = result.arms[name]
            shares = [sum(t <= at for t in arm.times) / result.plan.seeds for at in checks]
            quartiles = [statistics.quantiles(each, n=4) for each in arm.validation_errors]
            low, middle, high = zip(*quartiles, strict=True)
            axes[0, column].plot(checks, shares, color=colour, label=name)
            axes[1, column].plot(checks, middle, color=colour)
            axes[1, column].fill_between(checks, low, high, color=colour, alpha=0.2, linewidth=0)
        axes[0, column].set_title(f"L = {result.plan.length}")
        axes[1, column].set_xlabel("updates")
    axes[0, 0].set_ylabel("share of seeds that have solved it")
    axes[0, 0].set_ylim(-0.02, 1.02)
    axes[1, 0].set_ylabel(f"error on {VALIDATION} sequences:\nmedian and quartiles of the seeds")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)
