"""What each rule allows and learns, in plain Python, and what a clipper is given to have it."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradclip import thresholds

INF, NAN = math.inf, math.nan


class Rule:
    """A rule for the largest norm, with a state for each norm that it rules.

    Args:
        real: What the clipper is given; its class has the name of the model's.
    """

    fresh: Any = None
    """The state of a norm that has seen nothing; None for a rule that learns nothing."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.labels: tuple[str, ...] = ()
        self.states: list[Any] = []

    def start(self, labels: tuple[str, ...]) -> None:
        """Begin with these labels, or go on where they begin with those before."""
        if labels[: len(self.labels)] != self.labels:
            self.states = []
        self.states += [copy.deepcopy(self.fresh) for _ in labels[len(self.states) :]]
        self.labels = labels

    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        return [self.threshold(state, norm) for state, norm in zip(self.states, norms, strict=True)]

    def threshold(self, state: Any, norm: float) -> float:
        raise NotImplementedError

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        """Return the state after a finite norm with a gradient behind it."""
        return state


class Fixed(Rule):
    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        limit = self.real(step) if callable(self.real) else self.real
        return [INF if limit is None else limit] * len(norms)


class Schedule(Fixed):
    """A function of the step."""


class ZScore(Rule):
    fresh = ((), None, None)  # the norms of the warm-up, mean, variance

    def threshold(self, state: Any, norm: float) -> float:
        _, mean, variance = state
        if not mean:
            return INF
        deviation = math.sqrt(variance)
        score = (norm - mean) / (deviation + 1e-3)
        return mean + 0.5 * 0.5 * deviation / score if score > 0.5 else INF

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        first, mean, variance = state
        if mean is None:
            first = (*first, norm)
            if len(first) < 2:
                return first, None, None
            mean = math.fsum(first) / 2
            return first, mean, bounded_square(first[0] - mean)
        own = min(norm, self.threshold(state, norm))
        mean = 0.5 * mean + 0.5 * own
        return first, mean, 0.5 * variance + 0.5 * bounded_square(own - mean)


class Percentile(Rule):
    fresh: tuple[float, ...] = ()

    def threshold(self, state: tuple[float, ...], norm: float) -> float:
        norms = sorted((*state, norm)) if norm < INF else sorted(state)
        if not norms:
            return 100.0
        rank = (len(norms) - 1) * 0.3
        below, above = norms[int(rank)], norms[min(int(rank) + 1, len(norms) - 1)]
        return min(max(below + (above - below) * (rank % 1), 0.25), 100.0)

    def learned(self, state: tuple[float, ...], norm: float, clipped: float) -> Any:
        return (*state, norm)[-3:]


class Quantile(Rule):
    fresh = 0.0

    def threshold(self, state: float, norm: float) -> float:
        return 1.5 * state if state else INF

    def learned(self, state: float, norm: float, clipped: float) -> float:
        if not norm:
            return state
        moved = state * math.exp(-0.5 * ((norm <= state) - 0.25)) if state else norm
        range_ = torch.finfo(torch.float64)
        return min(max(moved, range_.tiny), range_.max)


class Auto(Rule):
    fresh = (1.33, -1.0, 0.0, 0.0, 0.0)  # calm, turns, level, last norm, the one before

    def threshold(self, state: Any, norm: float) -> float:
        calm, turns, level, *_ = state
        return min(max(calm, turns, 1.0), 3.0) * level if level else INF

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        calm, turns, level, last, before = state
        if not norm or not clipped:
            return state
        near, nearer = (min(norm / one, 1 / (norm / one)) if one else 0.0 for one in (last, before))
        close = min(near, self.threshold(state, norm) / norm)
        change = min(norm - level, level)
        rise = min(1 / 3 * min(max(calm, turns, 1.0), 3.0) * change, change)
        smallest = torch.finfo(torch.float64).tiny
        return (
            0.96 * calm + (0.04 * 9 * close - 0.04 * 3.8),
            0.92 * turns + (0.08 * 20 * (nearer - near) - 0.08),
            level + (0.04 * rise + smallest) if level else norm,
            norm,
            last,
        )


class GrowthLimit(Rule):
    fresh = 0.0

    def threshold(self, state: float, norm: float) -> float:
        return 1.25 * state if state else INF

    def learned(self, state: float, norm: float, clipped: float) -> float:
        return clipped or state


class MovingAverage(Rule):
    fresh = (0, 0.0)

    def thresholds(self, norms: list[float], step: int, order: float) -> list[float]:
        whole = model_norm([norm for norm in norms if norm < INF], order)
        warm = [3.0 * norm / whole if whole > 3.0 else INF for norm in norms]
        each = zip(self.states, warm, strict=True)
        return [shared if count < 2 else 1.25 * average for (count, average), shared in each]

    def learned(self, state: Any, norm: float, clipped: float) -> Any:
        count, average = state
        if not clipped:
            return state
        if count >= 2:
            return count + 1, 0.75 * average + 0.25 * clipped
        return count + 1, min(average, clipped) if count else clipped


RULES: dict[str, Callable[[], Rule]] = {
    "one": lambda: Fixed(1.0),
    "five": lambda: Fixed(5.0),
    "zero": lambda: Fixed(0),
    "nothing": lambda: Fixed(None),
    "plan": lambda: Schedule(lambda step: None if step % 4 == 3 else 1.0 + step % 3),
    "z-score": lambda: ZScore(thresholds.ZScore(0.5, decay=0.5, warmup=2, eps=1e-3)),
    "percentile": lambda: Percentile(thresholds.Percentile(30, window=4, floor=0.25, cap=100.0)),
    "quantile": lambda: Quantile(thresholds.Quantile(25, 0.5, factor=1.5)),
    "auto": lambda: Auto(thresholds.Auto()),
    "growth": lambda: GrowthLimit(thresholds.GrowthLimit(1.25)),
    "average": lambda: MovingAverage(
        thresholds.MovingAverage(1.25, decay=0.75, warmup=2, warmup_norm=3.0)
    ),
}


def model_norm(values: Sequence[float], order: float) -> float:
    """The norm; NaN where one of the values is, infinite where the power sum is."""
    magnitudes = [abs(value) for value in values]
    if any(map(math.isnan, magnitudes)):
        return NAN
    if order == INF or INF in magnitudes:
        return max(magnitudes, default=0.0)
    try:
        return math.fsum(magnitude**order for magnitude in magnitudes) ** (1 / order)
    except OverflowError:
        return INF


def bounded_square(value: float) -> float:
    return min(value * value, torch.finfo(torch.float64).max)
