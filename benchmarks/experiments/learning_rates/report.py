"""Final losses by learning rate as Markdown; all sentences follow from numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from benchmarks.common.markdown import table
from benchmarks.experiments.learning_rates.curves import (
    ARMS,
    BEST,
    GRID,
    NEAR,
    ONE,
    Curve,
    Point,
    curves_of,
    decades,
    furthest_above,
    lowest,
    points_of,
    rates_that_train,
)
from benchmarks.experiments.learning_rates.outcomes import Outcome
from benchmarks.experiments.without_tuning.arms import AUTO, NONE

TITLES = {
    NONE: "no clipping",
    BEST: "the best fixed threshold",
    ONE: "threshold 1",
    AUTO: '`"auto"`',
}
"""The curves that are drawn; `"auto"` is compared with the others."""
DEFINITIONS = (
    (
        f"A rate *trains* if its mean loss is within {NEAR:.0%} of the lowest mean loss of all "
        "arms and rates of the network. The range of an arm is its longest run of neighbouring "
        "rates that train; its width is the power of ten between its ends, 0.0 for one rate alone."
    ),
    (
        f"The best fixed threshold is chosen anew at each rate: of {', '.join(GRID)} the one with "
        "the lowest mean loss. It is chosen by the same runs that are shown, which favours it."
    ),
    (
        "A run *diverged* if its loss is not finite or above that of a uniform guess. The mean is "
        "infinite if one seed's loss is not finite."
    ),
)


def report(settings: Mapping[str, str], outcomes: Iterable[Outcome], guess: float) -> list[str]:
    """Return lines of Markdown.

    Args:
        settings: Settings of the trainings.
        outcomes: All outcomes.
        guess: Loss of a model for which all characters are equally likely.
    """
    outcomes = [*outcomes]
    lines = ["# Final loss against the learning rate", ""]
    lines += [f"- {what}: {how}" for what, how in settings.items()]
    for definition in DEFINITIONS:
        lines += ["", definition]
    for network in dict.fromkeys(outcome.network for outcome in outcomes):
        points = points_of(outcomes, network)
        curves = curves_of(points)
        lines += ["", f"## {network}", "", *_findings(curves), "", *_ranges(curves)]
        lines += ["", "Mean loss of the seeds, with the lowest and the highest:", ""]
        lines += _losses(points, guess)
    return lines


def _findings(curves: Mapping[str, Curve]) -> list[str]:
    best = lowest(curves.values())
    counts = {name: len(rates_that_train(curve, best.mean)) for name, curve in curves.items()}
    others = {name: TITLES[name] for name in TITLES if name != AUTO}
    more = (
        f"{_beside(counts[AUTO], counts[name])} {it} ({counts[name]})"
        for name, it in others.items()
    )
    sides = (f"{_sides(curves[AUTO], curves[name])} with {it}" for name, it in others.items())
    auto, fixed = furthest_above(curves[AUTO], curves[BEST])
    at_edge = [f"{point.rate:g}" for point in curves[BEST] if point.arm == GRID[0]]
    edge = (
        f"- At {', '.join(at_edge)} the best fixed threshold is {GRID[0]}, the lowest of the grid: "
        "a lower one, which was not tried, may be better."
    )
    return [
        (
            f"- The lowest mean loss is {best.mean:.3f}, of {_arm(best.arm)} at {best.rate:g}; a "
            f"rate trains with a mean loss up to {(1 + NEAR) * best.mean:.3f}."
        ),
        (
            f"- {TITLES[AUTO]} trains at {counts[AUTO]} of {len(curves[AUTO])} rates: "
            f"{', '.join(more)}."
        ),
        f"- Its mean loss is {'; '.join(sides)}.",
        (
            f"- Beside {TITLES[BEST]}, {TITLES[AUTO]} does worst at {auto.rate:g}: "
            f"{_loss(auto.mean)}, and {_loss(fixed.mean)} with {_arm(fixed.arm)}."
        ),
        *([edge] if at_edge else []),
    ]


def _arm(arm: str) -> str:
    return TITLES.get(arm, f"threshold {arm}")


def _beside(count: int, other: int) -> str:
    if count == other:
        return "as many as"
    return "more than" if count > other else "fewer than"


def _sides(curve: Curve, other: Curve) -> str:
    """Compare the means at each rate as they are printed: most differ in a further digit."""
    pairs = [
        (_loss(here.mean), _loss(there.mean)) for here, there in zip(curve, other, strict=True)
    ]
    below = sum(float(here) < float(there) for here, there in pairs)
    above = sum(float(here) > float(there) for here, there in pairs)
    return f"lower at {below} and higher at {above} rates than"


def _ranges(curves: Mapping[str, Curve]) -> list[str]:
    best = lowest(curves.values()).mean
    rows = []
    for name, curve in curves.items():
        rates = rates_that_train(curve, best)
        own = lowest([curve])
        at = f"{own.rate:g}" if name != BEST else f"{own.rate:g}, threshold {own.arm}"
        width = f"{decades(rates):.1f}" if rates else ""
        rows.append([_arm(name), _range(rates), width, f"{own.mean:.3f}", at])
    return table(["arm", "rates that train", "decades", "lowest mean loss", "at rate"], rows)


def _range(rates: list[float]) -> str:
    if not rates:
        return "none"
    return f"{rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else f"{rates[0]:g}"


def _losses(points: Mapping[tuple[float, str], Point], guess: float) -> list[str]:
    head = ["rate", *(_arm(arm) for arm in ARMS)]
    rates = sorted({rate for rate, _ in points})
    return table(
        head, [[f"{rate:g}", *(_cell(points[rate, arm], guess) for arm in ARMS)] for rate in rates]
    )


def _cell(point: Point, guess: float) -> str:
    diverged, seeds = point.diverged(guess), len(point.losses)
    if diverged:
        finite = [loss for loss in point.losses if math.isfinite(loss)]
        shown = f", mean {_loss(point.mean)}" if len(finite) == seeds else ""
        return f"{diverged} of {seeds} diverged{shown}"
    return f"{_loss(point.mean)} ({_loss(min(point.losses))} to {_loss(max(point.losses))})"


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
