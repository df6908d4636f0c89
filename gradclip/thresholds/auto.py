"""A threshold without a number to choose: one to three times a level, as the norms are close."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, clamped, closeness, larger, or_infinity, smaller

WEIGHT, QUICK = 0.04, 0.08
"""Weight of a norm in the level and in ``calm``, which follow the last 25 norms or so, and in
``turns``, which has to be seen soon."""
WIDEST = 3.0
"""The largest factor of the level, of norms that stay close."""
TINY = torch.finfo(torch.float64).tiny
"""Added to a level at each step, which stays above 0 and normal: 0 is no level yet, and a denormal
one would round its changes away."""
# The state has five rows, and a step moves each to keep * row + (gain * value + bias).
START = {"calm": 1.33, "turns": -1.0, "level": 0.0, "last": 0.0, "before": 0.0}
LEVEL = 2  # its row
KEEP = (1 - WEIGHT, 1 - QUICK, 1.0, 0.0, 0.0)
GAIN = (WEIGHT * 9, QUICK * 20, WEIGHT, 1.0, 1.0)
BIAS = (WEIGHT * -3.8, QUICK * -1, TINY, 0.0, 0.0)


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
    - ``T = factor level``, without cap and floor.

    The level rises by at most 4 % a step, or 1.3 % if norms are scattered without order, and falls
    by at most 4 %. The first norm sets the level and is not limited. At the start ``calm`` is 1.33,
    ``turns`` is -1, and a ratio to a norm that was not there is 0. The rule learns from norms
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
    settles_after = 5
    settled_from = TINY
    signed = ("calm", "turns")

    def __init__(self, *, cap: float | None = None, floor: float | None = None) -> None:
        super().__init__(cap=cap, floor=floor)
        self._asked: tuple[Any, ...] = (None,)
        """What `_limits` returned for the norms of the present step."""

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`: a level and a norm of 0 stand for no norm yet."""
        return {
            name: torch.full((count,), start, device=device, dtype=dtype)
            for name, start in START.items()
        }

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`. The state becomes rows of one tensor, moved by few operators."""
        super().start(labels, device, dtype)
        self._rows = torch.stack([*self.state.values()])
        self._numbers, self._last_two = self._rows.view(-1), self._rows[-2:]
        self.state = dict(zip(START, self._rows.unbind(), strict=True))
        columns = torch.tensor([KEEP, GAIN, BIAS], dtype=dtype, device=device)
        self._keep, self._gain, self._bias = columns.unsqueeze(2)
        self._bias[LEVEL] = torch.finfo(dtype).tiny  # TINY is 0 in float32

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
        one_norm = isinstance(norm, float)
        to_last, to_before = closeness(norm, (last, before) if one_norm else self._last_two)
        change = smaller(norm - level, level)  # no norm counts as more than twice the level
        change = smaller(1 / WIDEST * factor * change, change)  # a rise counts by the factor
        values = (smaller(to_last, limit / norm), to_before - to_last, change, norm, last)
        if one_norm:
            self._move_numbers(rows, values)
        else:
            self._move_rows(level, values, observed)
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

    def _move_numbers(self, rows: Sequence[float], values: Sequence[float]) -> None:
        """Move the rows of one norm; a first norm is the level."""
        columns = zip(rows, values, KEEP, GAIN, BIAS, strict=True)
        moved = [keep * row + (gain * value + bias) for row, value, keep, gain, bias in columns]
        if not rows[LEVEL]:
            moved[LEVEL] = values[-2]
        self._numbers.numpy()[:] = moved  # in half the time of five `fill_`

    def _move_rows(self, level: Tensor, values: Sequence[Tensor], observed: Tensor | None) -> None:
        """Move the rows of k norms where they are observed; a first norm is the level."""
        moved = torch.stack([*values]).mul_(self._gain).add_(self._bias)
        moved.add_(self._keep * self._rows)
        if not self.settled:
            torch.where(level > 0, moved[LEVEL], values[-2], out=moved[LEVEL])
        if observed is None:
            self._rows.copy_(moved)
        else:
            torch.where(observed, moved, self._rows, out=self._rows)
