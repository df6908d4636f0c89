"""A threshold without a number to choose: one to three times a level, as the norms are close."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import (
    NumberOrTensor,
    clamped,
    larger,
    numbers_or_tensors,
    or_infinity,
    quotient,
    smaller,
    where,
)

WEIGHT = 0.04
"""Weight of a norm in the level and in the closeness, which follow the last 25 norms or so."""
START = 0.57
"""Closeness before the first norm: the first thresholds are little above the level."""
SCATTERED, CLOSE, WIDEST = 0.533, 0.756, 3.0
"""Closeness up to which the threshold is the level, and from which it is ``WIDEST`` times that."""
SLOPE = (WIDEST - 1) / (CLOSE - SCATTERED)
OFFSET = 1 - SLOPE * SCATTERED
QUICK = 0.08
"""Weight of a norm in the alternation, which has to be seen soon."""
UNRELATED, ALTERNATING = 1.1, 1.2
"""The same two bounds for the alternation, which is 1 where norms have no order."""
STEEP = (WIDEST - 1) / (ALTERNATING - UNRELATED)
BELOW = 1 - STEEP * UNRELATED


class Auto(AdaptiveThreshold):
    """A threshold that nobody has to choose: ``max_norm="auto"``.

    Successive norms with a ratio of 2 or less belong to a training that goes well: the threshold is
    three times their level, and clips hardly anything but spikes. Norms that jump by more belong to
    an explosion or to noise with heavy tails: the threshold is the level itself, which rises
    slowly, so that an explosion does not lift it. In between the factor falls linearly. The rule
    begins as if norms jumped, since an explosion may begin with the training. Norms that rise and
    fall by turns, each near to the last but one, belong to steps that bounce between the sides of a
    valley, which longer steps leave sooner: the threshold is again three times the level.
    <!-- test: tests/behaviour/thresholds/test_auto.py -k 'stay_close or jump or turns' -->

    The rule sees norms alone, and so it has limits. If the learning rate is so high that even steps
    of the first norm are too long, only a lower rate or threshold helps. If norms are noise from
    first to last, a threshold below their level is better. The rule follows an explosion that is as
    smooth and slow as a healthy rise, by 4 % a step or less, and for a while one of 6 %; one that
    rises and falls by turns lifts the threshold by 4 % a step. A spike at the first step hides
    others until the level has come down.
    <!-- test: tests/behaviour/thresholds/test_auto.py -k 'lifts or decades or first_step' -->

    In the formulas n is the norm, p the last one, b the one before and T the threshold. A mean is
    exponential: a new value has the weight 0.04, in the alternation 0.08.

    - ``closeness = mean of min(n / p, p / n, T / n)``, from 0 to 1;
    - ``alternation = mean of 1 + min(n / b, b / n) - min(n / p, p / n)``, from 0 to 2;
    - ``factor = clamp(1 + max(9 (closeness - 0.533), 20 (alternation - 1.1)), 1, 3)``, to be exact
      with the slope 2 / 0.223 instead of 9;
    - ``level = mean of min(n, 2 level)``, whose rises count ``factor / 3`` times;
    - ``T = factor level``.

    The level rises by at most 4 % a step, or 1.3 % if norms are scattered without order, and falls
    by at most 4 %. The first norm sets the level and is not limited. The rule learns from norms
    before clipping, and not from a norm of 0. The constants were chosen on 19 trainings and tried
    on 9 others: see ``benchmarks/results/without_tuning.md``.
    <!-- test: tests/behaviour/thresholds/test_auto.py -k 'lift or decades or zero' -->

    Memory: ``5 k`` norms.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_clipped = False
    observes_zeros = False

    def __init__(self, *, cap: float | None = None, floor: float | None = None) -> None:
        super().__init__(cap=cap, floor=floor)
        self._asked: tuple[Any, ...] = (None,)
        """What `_limits` returned for the norms of the present step."""

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`: a level and a norm of 0 stand for no norm yet."""
        starts = {"level": 0, "last": 0, "before": 0, "closeness": START, "alternation": 1}
        return {
            name: torch.full((count,), start, device=device, dtype=dtype)
            for name, start in starts.items()
        }

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return self._limits(norms)[-1]  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        asked = self._asked if self._asked[0] is norms else self._limits(norms)
        norm, level, last, before, closeness, alternation, factor, limit = asked
        near = smaller(quotient(norm, last), last / norm)
        nearer = smaller(quotient(norm, before), before / norm)
        closeness = closeness + WEIGHT * (smaller(near, limit / norm) - closeness)
        alternation = alternation + QUICK * (1 + nearer - near - alternation)
        # Before the first norm there is no level, and the norm becomes it.
        level = where(level > 0, level, norm)
        change = smaller(norm - level, level)  # no norm counts as more than twice the level
        level = level + smaller(WEIGHT / WIDEST * factor * change, WEIGHT * change)
        # A denormal level would round each of its changes away.
        level = clamped(level, low=torch.finfo(self.state["level"].dtype).tiny)
        self.put(observed, before=last)  # first: a tensor is overwritten
        self.put(observed, level=level, last=norm, closeness=closeness, alternation=alternation)
        self._asked = (None,)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        self._asked = (None,)

    def _limits(self, norms: Any) -> tuple[Any, ...]:
        """Return norms and state, as numbers for one number, and then factors and limits.

        Without cap and floor, which are no part of what the rule learns from.
        """
        numbers = numbers_or_tensors(norms, *self.state.values())
        _, level, _, _, closeness, alternation = numbers
        factor = larger(SLOPE * closeness + OFFSET, STEEP * alternation + BELOW)
        factor = clamped(factor, low=1.0, high=WIDEST)
        self._asked = (*numbers, factor, factor * or_infinity(level))
        return self._asked
