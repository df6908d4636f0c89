"""A threshold in proportion to the norm of the weights: AGC."""

from __future__ import annotations

import math

from ..checks import checked_positive
from ..engines.base import RelativeLimit
from ..errors import ArgumentError
from .base import Rule, StepContext
from .numbers import NumberOrTensor, clamped, numbers_or_tensors


class RelativeToWeights(Rule):
    """A limit in proportion to the norm of the weights: AGC.

    ``threshold = factor max(weight norm, eps)``: Brock, De, Smith and Simonyan, "High-Performance
    Large-Scale Image Recognition Without Normalization" (2021), arXiv:2102.06171, which has the
    scope "unit" and excludes the last layer. Without eps, weights that start at 0 would stay
    there forever.
    <!-- test: tests/contracts/rules/test_papers.py -k agc;
    tests/contracts/rules/test_contract.py -->

    It learns nothing, has no warm-up and keeps no state; it reads the parameters at every step.
    <!-- test: tests/behaviour/thresholds/test_relative_to_weights.py -->

    Args:
        factor: Largest norm of a gradient as a multiple of its weights' norm, above 0.
        eps: A weight norm below it is replaced by it, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    needs_weights = True

    def __init__(
        self,
        factor: float = 0.01,
        eps: float = 1e-3,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.factor = checked_positive("factor", factor)
        self.eps = checked_positive("eps", eps)

    @property
    def relative_limit(self) -> RelativeLimit:
        """The same rule for engines, which apply it to rows while they measure them."""
        floor, cap = self.floor or 0.0, math.inf if self.cap is None else self.cap
        return RelativeLimit(self.factor, self.eps, floor, cap)

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`.

        Raises:
            ArgumentError: The step has no weight norms.
        """
        if context.weight_norms is None:
            raise ArgumentError(
                "RelativeToWeights got a step without weight norms: the caller has to measure them "
                "for a rule with needs_weights, as GradientClipper does."
            )
        _, weight_norms = numbers_or_tensors(norms, context.weight_norms)
        return self.factor * clamped(weight_norms, low=self.eps)  # type: ignore[no-any-return]
