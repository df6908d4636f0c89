"""A threshold at a factor times the clipped norm of the previous step: Fira."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, numbers_or_tensors, or_infinity


class GrowthLimit(AdaptiveThreshold):
    """A limit to the growth of a norm from one step to the next.

    ``threshold = factor previous clipped norm``: the norm-growth limiter of Chen and others,
    "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?" (2024),
    arXiv:2410.01623.
    <!-- test: tests/contracts/rules/test_papers.py -k growth;
    tests/contracts/rules/test_contract.py -->

    It observes clipped norms. There is no limit before the first one, and no other warm-up. A norm
    that is 0 after clipping is not observed: no multiple of 0 leads away from it.
    <!-- test: tests/contracts/rules/test_papers.py -k clipped_to_zero -->

    Memory: ``k`` norms.

    Args:
        factor: Largest ratio of a norm to the previous one, above 0 and usually above 1.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_zeros = False

    def __init__(
        self, factor: float = 1.01, *, cap: float | None = None, floor: float | None = None
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.factor = checked_positive("factor", factor)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`: 0 stands for no norm yet."""
        return {"previous": torch.zeros(count, device=device, dtype=dtype)}

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        _, previous = numbers_or_tensors(norms, self.state["previous"])
        return self.factor * or_infinity(previous)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        self.put(observed, previous=clipped_norms)
