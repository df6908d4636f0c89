"""A limit for norms that are outliers among the recent ones: ZClip."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_decay, checked_positive
from .adaptive import AdaptiveThreshold
from .arithmetic import is_number, square_root, where
from .base import StepContext


class ZScore(AdaptiveThreshold):
    """A limit for norms that lie many standard deviations above a moving mean: ZClip.

    ``z_score = (norm - mean) / (std + eps)``; where it is above z,
    ``threshold = mean + z^2 std / z_score``, which is the lower the further the norm is out,
    else there is no limit: Kumar and others, "ZClip: Adaptive Spike Mitigation for LLM
    Pre-Training" (2025), arXiv:2504.02507. The authors' code has a cap of 1 besides: ``cap=1.0``.

    It observes norms as this rule itself clips them, before cap and floor:
    ``mean = decay mean + (1 - decay) x``, ``var = decay var + (1 - decay) (x - mean)^2`` with the
    new mean. During the warm-up, which sets no limit, it takes the mean and the population
    variance of the norms as measured.

    A rule that saw only norms of 0 sets no limit: a threshold of 0 would confirm itself for
    ever.

    Memory: ``2 k`` norms and ``k`` counts.

    Args:
        z: How many standard deviations are too many, above 0.
        decay: Share that mean and variance keep at a step, in [0, 1).
        warmup: How many norms of a label are observed before the first limit, 1 or more.
        eps: Added to the standard deviation, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
    """

    def __init__(
        self,
        z: float = 2.5,
        decay: float = 0.97,
        warmup: int = 25,
        eps: float = 1e-6,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.z = checked_positive("z", z)
        self.decay = checked_decay(decay)
        self.warmup = checked_count("warmup", warmup, least=1)
        self.eps = checked_positive("eps", eps)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return {
            "mean": torch.zeros(count, device=device, dtype=dtype),
            "variance": torch.zeros(count, device=device, dtype=dtype),
            "counts": torch.zeros(count, device=device, dtype=torch.int64),
        }

    def limits(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Rule.limits`."""
        limit = self._limit(*self._known(norms))
        return limit if isinstance(limit, Tensor) else torch.full_like(norms, limit)

    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """See `AdaptiveThreshold.learn`."""
        norm, mean, variance, count = self._known(norms)
        limit = self._limit(norm, mean, variance, count)
        warm = count < self.warmup
        weight = where(warm, 1 / (count + 1.0), 1 - self.decay)
        own = where(norm < limit, norm, limit)
        before = own - mean
        mean = mean + weight * before
        after = own - mean
        # Welford's recurrence: with a weight of 1 / count these are the mean and the population
        # variance of all norms so far, without a buffer.
        variance = (1 - weight) * variance + weight * (where(warm, before, after) * after)
        # The square of a norm can be infinite, which would end all limits.
        largest = torch.finfo(norms.dtype).max
        variance = where(variance < largest, variance, largest)
        self.put(observed, mean=mean, variance=variance, counts=count + 1)

    def _known(self, norms: Tensor) -> tuple[Any, Any, Any, Any]:
        """Return norm, mean, variance and count, as numbers or as vectors."""
        mean, variance, counts = self.state["mean"], self.state["variance"], self.state["counts"]
        if is_number(norms):
            return norms.item(), mean.item(), variance.item(), counts.item()
        return norms, mean, variance, counts.to(norms.dtype)

    def _limit(self, norm: Any, mean: Any, variance: Any, count: Any) -> Any:
        std = square_root(variance)
        score = (norm - mean) / (std + self.eps)
        limited = (score > self.z) & (mean > 0) & (count >= self.warmup)
        score = where(limited, score, self.z)  # a score of 0 divides no number
        return where(limited, mean + self.z * self.z * std / score, math.inf)
