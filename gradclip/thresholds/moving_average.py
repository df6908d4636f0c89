"""A threshold at a factor times the moving average of clipped norms: AdaGC."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_decay, checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, numbers_or_tensors, or_infinity, smaller, where


class MovingAverage(AdaptiveThreshold):
    """A limit a little above the moving average of each label's clipped norms: AdaGC.

    ``threshold = factor average`` and ``average = decay average + (1 - decay) clipped norm``:
    Wang and others, "AdaGC: Improving Training Stability for Large Language Model Pretraining"
    (2025), arXiv:2502.11034, which has the scope "parameter".
    <!-- test: tests/contracts/rules/test_papers.py -k adagc;
    tests/contracts/rules/test_contract.py -->

    It observes clipped norms. A label is in its warm-up until ``warmup`` of its norms were
    observed. Until then ``threshold = warmup_norm norm / total`` where the total, the norm of all
    labels together in the norms' own order, exceeds ``warmup_norm``, and the average is the
    smallest clipped norm so far. A step that is taken inside ``backward()`` knows no norm but its
    own, which is then the total.
    <!-- test: tests/contracts/rules/test_papers.py -k warm_up -->

    A norm that is 0 after clipping is not observed: an average of 0 would erase its label
    forever.
    <!-- test: tests/contracts/rules/test_papers.py -k clipped_to_zero -->

    Memory: ``k`` norms and ``k`` counts.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        factor: Largest norm as a multiple of the average, above 0.
        decay: Weight of the old average at a step, in [0, 1).
        warmup: How many norms of a label are observed before its average is used, 1 or more.
        warmup_norm: Largest norm of all labels together during the warm-up, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_zeros = False

    def __init__(
        self,
        factor: float = 1.05,
        decay: float = 0.98,
        warmup: int = 100,
        warmup_norm: float = 1.0,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.factor = checked_positive("factor", factor)
        self.decay = checked_decay(decay)
        self.warmup = checked_count("warmup", warmup, least=1)
        self.warmup_norm = checked_positive("warmup_norm", warmup_norm)
        self.settles_after = self.warmup

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return {
            "average": torch.zeros(count, device=device, dtype=dtype),
            "counts": torch.zeros(count, device=device, dtype=torch.int64),
        }

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        _, average, count = numbers_or_tensors(norms, self.state["average"], self.state["counts"])
        warm = not self.settled and count < self.warmup
        # Past the warm-up of all labels, as far as the host knows, it costs nothing.
        if warm is False:
            return self.factor * average  # type: ignore[no-any-return]
        shared = self._shared_limits(norms, context.order)
        return where(warm, shared, self.factor * average)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        norm, average, count = numbers_or_tensors(
            clipped_norms, self.state["average"], self.state["counts"]
        )
        moved = self.decay * average + (1 - self.decay) * norm
        warm = not self.settled and count < self.warmup
        if warm is not False:
            # An average is 0 only before the first norm, as no norm of 0 is observed.
            moved = where(warm, smaller(or_infinity(average), norm), moved)
        self.put(observed, average=moved)
        self.count(observed, count)

    def _shared_limits(self, norms: Any, order: float) -> Any:
        """Return limits that scale the norm of all finite norms together to ``warmup_norm``."""
        if isinstance(norms, float):
            return self.warmup_norm if self.warmup_norm < norms < math.inf else math.inf
        finite = norms < math.inf
        usable = torch.where(finite, norms, 0.0)
        # Powers of norms relative to the largest neither overflow nor all vanish.
        largest = usable.amax()
        relative = usable / largest  # NaN where all are 0, which then exceeds nothing
        length = torch.linalg.vector_norm(relative, order)
        exceeds = finite & (largest * length > self.warmup_norm)
        return self.limits_where(exceeds, relative / length * self.warmup_norm)
