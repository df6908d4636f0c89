"""A threshold without a number to choose: one to three times a level, as the norms are close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import (
    NumberOrTensor,
    clamped,
    closeness,
    larger,
    or_infinity,
    smaller,
)

WEIGHT, QUICK = 0.04, 0.08
"""Weight of a norm in the level and in ``calm``, which follow the last 25 norms or so, and in
``turns``, which has to be seen soon."""
WIDEST = 3.0
"""The largest factor of the level, of norms that stay close."""
TINY = torch.finfo(torch.float64).tiny
"""Added to a level at each step: 0 is none, and a denormal one would round its changes away."""
ROWS = {  # name: start, keep, gain, bias; a value moves a row to keep * row + (gain * value + bias)
    "calm": (1.33, 1 - WEIGHT, WEIGHT * 9, WEIGHT * -3.8),
    "turns": (-1.0, 1 - QUICK, QUICK * 20, QUICK * -1),
    "level": (0.0, 1.0, WEIGHT, TINY),
    "last": (0.0, 0.0, 1.0, 0.0),
    "before": (0.0, 0.0, 1.0, 0.0),
}
"""The state: two factors that the norms suggest, the level, and the last two norms."""
MOVES, LEVEL = ROWS.values(), [*ROWS].index("level")


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
    exponential: a new value has the weight 0.04, in ``turns`` 0.08.

    - ``calm = mean of 9 min(n / p, p / n, T / n) - 3.8``, from -3.8 to 5.2;
    - ``turns = mean of 20 (min(n / b, b / n) - min(n / p, p / n)) - 1``, from -21 to 19;
    - ``factor = clamp(max(calm, turns), 1, 3)``;
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
    settles_after = TINY
    signed = ("calm", "turns")

    def __init__(self, *, cap: float | None = None, floor: float | None = None) -> None:
        super().__init__(cap=cap, floor=floor)
        self._asked: tuple[Any, ...] = (None,)
        """What `_limits` returned for the norms of the present step."""

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`: a level and a norm of 0 stand for no norm yet."""
        return {
            name: torch.full((count,), start, device=device, dtype=dtype)
            for name, (start, *_) in ROWS.items()
        }

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`. The state becomes rows of one tensor, moved by few operators."""
        super().start(labels, device, dtype)
        self._rows = torch.stack([*self.state.values()])
        self._recent, self._numbers = self._rows[3:], self._rows.view(-1)
        self.state = dict(zip(ROWS, self._rows.unbind(), strict=True))
        columns = torch.tensor([*MOVES], dtype=dtype, device=device).T.unsqueeze(2)
        _, self._keep, self._gain, self._bias = columns.contiguous()
        self._bias[LEVEL] = torch.finfo(dtype).tiny  # of float32, where the norms are

    @property
    def seen(self) -> Tensor:
        """The levels of the labels: a level is above 0 from the first norm on."""
        return self.state["level"]

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return self._limits(norms)[-1]  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        asked = self._asked if self._asked[0] is norms else self._limits(norms)
        norm, rows, factor, limit = asked
        _, _, level, last, before = rows
        recent = self._recent if isinstance(norm, Tensor) else (last, before)
        near, nearer = closeness(norm, recent)
        change = smaller(norm - level, level)  # no norm counts as more than twice the level
        rise = smaller(1 / WIDEST * factor * change, change)  # three times it may be infinite
        values = (smaller(near, limit / norm), nearer - near, rise, norm, last)
        moved = self._moved(rows, values)
        if isinstance(norm, float):
            self._numbers.numpy()[:] = moved
        elif observed is None:
            self._rows.copy_(moved)
        else:
            torch.where(observed, moved, self._rows, out=self._rows)
        self._asked = (None,)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        self._asked = (None,)

    def _limits(self, norms: Any) -> tuple[Any, ...]:
        """Return norms, rows of the state, factors and limits; all numbers for one number.

        Without cap and floor, which are no part of what the rule learns from.
        """
        rows = self._numbers.tolist() if isinstance(norms, float) else [*self.state.values()]
        calm, turns, level, *_ = rows
        factor = clamped(larger(calm, turns), low=1.0, high=WIDEST)
        limits = factor * (level if self.settled else or_infinity(level))
        self._asked = (norms, rows, factor, limits)
        return self._asked

    def _moved(self, rows: Sequence[Any], values: Sequence[Any]) -> Any:
        """Return the rows after a step, as a tensor or as numbers; a first norm is the level."""
        level, norm = rows[LEVEL], values[-2]
        if isinstance(norm, float):
            moves = zip(rows, values, MOVES, strict=True)
            numbers = [
                keep * row + (gain * value + bias) for row, value, (_, keep, gain, bias) in moves
            ]
            numbers[LEVEL] = numbers[LEVEL] if level else norm
            return numbers
        moved = torch.stack([*values]).mul_(self._gain).add_(self._bias)
        moved.add_(self._keep * self._rows)
        if not self.settled:
            torch.where(level > 0, moved[LEVEL], norm, out=moved[LEVEL])
        return moved
