"""A limit near the moving average of the clipped norms: AdaGC."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_decay, checked_positive
from .adaptive import AdaptiveThreshold
from .arithmetic import is_number, where
from .base import StepContext


class MovingAverage(AdaptiveThreshold):
    """A limit a little above the moving average of each label's clipped norms: AdaGC.

    ``threshold = factor average`` and ``average = decay average + (1 - decay) clipped norm``:
    Wang and others, "AdaGC: Improving Training Stability for Large Language Model Pretraining"
    (2025), arXiv:2502.11034, which has the scope "parameter".

    It observes clipped norms. During the warm-up, which each label counts by the norms observed
    of it, the norm over all labels together, of the norms' own order, is held to
    ``warmup_norm``: ``threshold = warmup_norm norm / norm of all`` where the latter is larger.
    The average is then the smallest clipped norm so far.

    A norm that is 0 after clipping is not observed: an average of 0 would erase its label for
    ever.

    Memory: ``k`` norms and ``k`` counts.

    Args:
        factor: How far above the average a norm may be, above 0.
        decay: Share that the average keeps at a step, in [0, 1).
        warmup: How many norms of a label are observed before its average rules, 1 or more.
        warmup_norm: Largest norm of all labels together during the warm-up, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
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

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return {
            "average": torch.zeros(count, device=device, dtype=dtype),
            "counts": torch.zeros(count, device=device, dtype=torch.int64),
        }

    def limits(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Rule.limits`."""
        if is_number(norms) and self.state["counts"].item() >= self.warmup:
            return torch.full_like(norms, self.factor * self.state["average"].item())
        warm = self.state["counts"] < self.warmup
        shared = self._shared_limits(norms, context.order)
        return torch.where(warm, shared, self.factor * self.state["average"])

    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """See `AdaptiveThreshold.learn`."""
        norm: Any = clipped_norms
        average: Any = self.state["average"]
        counts: Any = self.state["counts"]
        if is_number(norms):
            norm, average, counts = norm.item(), average.item(), counts.item()
        smallest = where((counts > 0) & (average < norm), average, norm)
        moved = self.decay * average + (1 - self.decay) * norm
        moved = where(counts < self.warmup, smallest, moved)
        self.put(observed, average=moved, counts=counts + 1)

    def _shared_limits(self, norms: Tensor, order: float) -> Tensor:
        """Return what holds the norm of all finite norms together to ``warmup_norm``."""
        finite = norms < math.inf
        known = torch.where(finite, norms, 0.0)
        # Powers of norms relative to the largest neither overflow nor all vanish.
        largest = known.amax()
        relative = known / largest  # NaN where all are 0, which then exceeds nothing
        length = torch.linalg.vector_norm(relative, order)
        exceeds = finite & (largest * length > self.warmup_norm)
        return torch.where(exceeds, relative / length * self.warmup_norm, math.inf)
