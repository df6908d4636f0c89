"""A threshold at a quantile of the norms that is tracked with one number: adaptive clipping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import checked_percentile, checked_positive, checked_rate
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, clamped, numbers_or_tensors, or_infinity, scaled, where


class Quantile(AdaptiveThreshold):
    """A multiple of a percentile of the norms, tracked without a window.

    ``threshold = factor level`` and, after each norm, ``level = level exp(-rate (below - p))``,
    where ``below`` is 1 if the norm was at or below the level, else 0, and ``p`` is
    ``percentile / 100``: the geometric update of Andrew, Thakkar, McMahan and Ramaswamy,
    "Differentially Private Learning with Adaptive Clipping" (2021), arXiv:1905.03871, without its
    noise. There ``below`` is the share of about a hundred norms of a round, and the rate is 0.2; of
    one norm a step it is noisier, hence the smaller rate here.
    <!-- test: tests/contracts/rules/test_papers.py -k quantile_is;
    tests/contracts/rules/test_contract.py -->

    The level rises by at most ``exp(rate p)`` a step and falls by at most ``exp(-rate (1 - p))``,
    whatever the norms are: with the defaults ten times as high in 93 steps, one tenth in 93. Over
    many steps the share of norms at or below it is p, unless the level itself rises or falls
    without end. A window, as in `Percentile`, is exact and forgets at once what leaves it; this
    rule needs one number in its place.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k at_most_its_rate;
    tests/contracts/rules/test_papers.py -k 'share_below or extreme or percentile_of_a_window' -->

    It observes norms as measured. The first norm sets the level, and is not limited; there is no
    other warm-up. A norm of 0 is not observed: where units are mostly idle, the level would fall to
    0, from which no multiple leads away.
    <!-- test: tests/contracts/rules/test_papers.py -k norms_of_0 -->

    Memory: ``k`` norms.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        percentile: From 0, where the level never rises, to 100, where it never falls.
        rate: Largest change of the level's logarithm at a step, above 0 and at most 1. A
            level that changes fast is noisy: its deviation grows with the root of the rate.
        factor: The threshold as a multiple of the level, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_clipped = False
    observes_zeros = False

    def __init__(
        self,
        percentile: float = 50.0,
        rate: float = 0.05,
        *,
        factor: float = 1.0,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.percentile = checked_percentile(percentile)
        self.rate = checked_rate(rate)
        self.factor = checked_positive("factor", factor)
        share = self.percentile / 100
        self._fall, self._rise = math.exp(-self.rate * (1 - share)), math.exp(self.rate * share)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`: 0 stands for no norm yet."""
        return {"level": torch.zeros(count, device=device, dtype=dtype)}

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        _, level = numbers_or_tensors(norms, self.state["level"])
        return scaled(or_infinity(level), self.factor)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        norm, level = numbers_or_tensors(norms, self.state["level"])
        moved = where(norm > level, level * self._rise, level * self._fall)
        range_ = torch.finfo(self.state["level"].dtype)
        # A level that is denormal or infinite would stay so, and 0 would be a fresh one.
        level = clamped(where(level > 0, moved, norm), low=range_.tiny, high=range_.max)
        self.put(observed, level=level)
