"""What came of both arms: intervals, paired tests, Markdown and a picture."""

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
    f"A seed has solved the task where it tells less than {_ALLOWED} of {TEST:,} fresh sequences "
    f"wrongly. That is tested at each check at which it tells at most {_ALLOWED} of {VALIDATION} "
    "wrongly, until it succeeds once, and for all seeds after the last update. A seed that "
    "diverges, with a parameter that is not finite, fails."
)
ABOUT_RATES = (
    "Intervals are Wilson's; the median update is that of the seeds that solved the task. A norm "
    "that is not finite erases the gradients of its own seed in the clipped arm; in the unclipped "
    "arm nothing is written and norms are only measured."
)
ABOUT_COMPARISONS = (
    "Seed by seed: both arms begin with the same weights and see the same sequences. p is "
    "two-sided, of McNemar's exact test, the sign test of the seeds that differ. Only success is "
    f"judged, at {LEVEL:g} divided by the number of lengths; other rows are for information."
)


@dataclass(frozen=True)
class Outcome:
    """What came of one arm; lists have an entry for each seed."""

    solved_at: list[int | None]
    """After how many updates; None for never."""
    diverged_at: list[int | None]
    """The first check at which a parameter was not finite."""
    final_errors: list[float]
    """Shares of the sequences that were told wrongly after the last update."""
    clip_rate: float
    """Share of the norms above the threshold."""
    largest_norms: list[float]
    """Before clipping."""
    validation_errors: list[list[float]]
    """At every check."""

    @classmethod
    def of(cls, arm: Arm) -> Outcome:
        """Test an arm as it is now."""
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
        """Whether each seed solved the task at some check, and never diverged."""
        pairs = zip(self.solved_at, self.diverged_at, strict=True)
        return [solved is not None and diverged is None for solved, diverged in pairs]

    @property
    def last_successes(self) -> list[bool]:
        """Whether each seed solves the task after the last update."""
        return [error < LARGEST_ERROR for error in self.final_errors]

    @property
    def times(self) -> list[float]:
        """After how many updates each seed solved the task; infinity where it is no success."""
        pairs = zip(self.solved_at, self.successes, strict=True)
        return [at if at is not None and success else NEVER for at, success in pairs]


@dataclass(frozen=True)
class Result:
    """What came of both arms for one length."""

    plan: Plan
    updates: int
    seconds: float
    arms: dict[str, Outcome]

    @classmethod
    def of(cls, pair: Pair) -> Result:
        """Test both arms as they are now."""
        outcomes = {name: Outcome.of(arm) for name, arm in pair.arms.items()}
        return cls(pair.plan, pair.updates, pair.seconds, outcomes)


@dataclass(frozen=True)
class Comparison:
    """In how many seeds one arm did better than the other that began as it did."""

    clipped: int
    unclipped: int
    alike: int

    @classmethod
    def of(cls, result: Result, outcome: str) -> Comparison:
        """Compare by one of `OUTCOMES`."""
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
        """Of the exact test of McNemar, which is the sign test of the seeds that differ."""
        return sign_test(self.clipped, self.unclipped)


OUTCOMES = {"successes": "more", "times": "less", "last_successes": "more"}
"""What the arms are compared by, and which of it is better."""
TOLD = {
    "successes": "solved it",
    "times": "solved it first",
    "last_successes": "solves it at the end",
}


def wilson(successes: int, count: int, level: float = LEVEL) -> tuple[float, float]:
    """Return Wilson's interval for a rate, which misses it with a probability of ``level``."""
    z = statistics.NormalDist().inv_cdf(1 - level / 2)
    share, scale = successes / count, 1 + z**2 / count
    middle = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(wins: int, losses: int) -> float:
    """Return the exact two-sided probability of a split so uneven or more, if both are as likely.

    With the two counts of discordant pairs this is McNemar's exact test.
    """
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, math.ldexp(tail, 1 - count))


def rates(results: list[Result]) -> list[str]:
    """Return what came of each arm, as a Markdown table."""
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
    """Return how the arms compare seed by seed, as a Markdown table."""
    lines = [
        "| L | which arm | clipped alone | unclipped alone | no difference | p |",
        "|---|---|---|---|---|---|",
    ]
    for outcome, told in TOLD.items():
        for result in results:
            found = Comparison.of(result, outcome)
            counts = f"{found.clipped} | {found.unclipped} | {found.alike}"
            lines.append(f"| {result.plan.length} | {told} | {counts} | {found.p_value:.2g} |")
    return lines


def verdicts(results: list[Result], updates: int, minutes: float) -> list[str]:
    """Say for each length what ended it, and whether success rates separate the arms."""
    level = LEVEL / len(results)
    lines = []
    for result in results:
        found, count = Comparison.of(result, "successes"), result.plan.seeds
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
            f"solved the task, unclipped {unclipped}. {_separation(found, level)}"
        )
    return lines


def _separation(found: Comparison, level: float) -> str:
    told = f"(p = {found.p_value:.2g}, level {level:.3g})"
    if found.p_value >= level:
        return f"Within this budget success rates do not separate the arms {told}."
    if found.clipped > found.unclipped:
        return f"Clipped seeds succeed more often {told}."
    return f"Unclipped seeds succeed more often {told}."


def draw(results: list[Result], path: Path) -> None:
    """Draw how many seeds have solved the task, and the errors at every check, as a picture."""
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
