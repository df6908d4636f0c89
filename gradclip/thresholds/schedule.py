"""A threshold that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..checks import checked_bound
from ..errors import ArgumentError
from .base import Rule, StepContext
from .numbers import NumberOrTensor, as_limits


class Schedule(Rule):
    """A threshold given by a function of the step, for a warm-up or a decay of the threshold.

    It learns nothing and keeps no state.
    <!-- test: tests/behaviour/thresholds/test_given.py -->

    Args:
        function: Called once a step with the index of the step, from 0; returns the largest
            allowed norm, 0 or more, or None for no limit at this step. The returned value is
            checked at every step, before any gradient is written.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: ``function`` is not callable, or is a class.
    """

    capturable = False  # in a captured CUDA graph nobody calls the function

    def __init__(
        self,
        function: Callable[[int], float | None],
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        if not callable(function) or isinstance(function, type):
            raise ArgumentError(
                f"Schedule got {function!r}: give a function of the step that returns a number "
                ">= 0, or None for no limit."
            )
        self.function = function

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`.

        Raises:
            ArgumentError: The function returned neither a number >= 0 nor None.
        """
        limit = self.function(context.step)
        if limit is not None:
            limit = checked_bound(f"max_norm({context.step})", limit)
        return as_limits(math.inf if limit is None else limit, norms)
