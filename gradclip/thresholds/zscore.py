"""A threshold on the z-score of a norm under a moving mean and variance: ZClip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_decay, checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import (
    NumberOrTensor,
    as_floats,
    clamped,
    numbers_or_tensors,
    or_infinity,
    plus_quotient,
    smaller,
    square_root,
    where,
)


class ZScore(AdaptiveThreshold):
    """A limit for norms that lie many standard deviations above a moving mean: ZClip.

    ``z_score = (norm - mean) / (std + eps)``. Where it is above z,
    ``threshold = mean + z^2 std / z_score``, which falls as the norm rises; elsewhere there is no
    limit: Kumar and others, "ZClip: Adaptive Spike Mitigation for LLM
    Pre-Training" (2025), arXiv:2504.02507. The authors' code also has a cap of 1: ``cap=1.0``.
    <!-- test: tests/contracts/rules/test_papers.py -k zscore_is;
    tests/contracts/rules/test_contract.py -->

    It observes norms clipped by its own limit, before cap and floor:
    ``mean = decay mean + (1 - decay) x``, ``var = decay var + (1 - decay) (x - mean)^2`` with the
    new mean. During the warm-up, which sets no limit, it takes the mean and the population
    variance of the norms as measured.
    <!-- test: tests/contracts/rules/test_papers.py -k zscore -->

    There is no limit while the mean is 0: a threshold of 0 would keep the mean at 0 forever.
    <!-- test: tests/contracts/rules/test_papers.py -k zscore -->

    Memory: ``2 k`` norms and ``k`` counts.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        z: Z-score above which a norm is limited, above 0.
        decay: Weight of the old mean and variance at a step, in [0, 1).
        warmup: How many norms of a label are observed before the first limit, 1 or more.
        eps: Added to the standard deviation, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_clipped = False

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
        self.settles_after = self.warmup
        self._asked: tuple[Any, Any] = None, None
        """The norms of the present step and their limits, without cap and floor."""

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return {
            "mean": torch.zeros(count, device=device, dtype=dtype),
            "variance": torch.zeros(count, device=device, dtype=dtype),
            "counts": torch.zeros(count, device=device, dtype=torch.int64),
        }

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return self._limits(norms)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        norm, mean, variance, count = self._numbers(norms)
        asked, limits = self._asked
        # Cap and floor are no part of what it observes.
        clipped = smaller(norm, limits if asked is norms else self._limits(norms))
        weight, factor = 1 - self.decay, (1 - self.decay) * self.decay
        warm = not self.settled and count < self.warmup
        if warm is not False:
            # Welford's recurrence: the mean and the population variance of all norms so far.
            share = 1 / (as_floats(count, norm) + 1.0)
            weight, factor = where(warm, share, weight), where(warm, share, factor)
        deviation = clipped - mean
        mean = mean + weight * deviation
        # The deviation from the new mean is 1 - weight of that from the old one. The square of a
        # norm can be infinite, which would end all limits.
        most = torch.finfo(self.state["variance"].dtype).max
        variance = clamped(variance + factor * deviation * deviation, high=most)
        variance = (1 - weight) * variance
        self.put(observed, mean=mean, variance=variance)
        self.count(observed, count)

    def _numbers(self, norms: Any) -> Sequence[Any]:
        """Return norm, mean, variance and count."""
        return numbers_or_tensors(
            norms, self.state["mean"], self.state["variance"], self.state["counts"]
        )

    def _limits(self, norms: Any) -> Any:
        norm, mean, variance, count = self._numbers(norms)
        std = square_root(variance)
        # A mean of 0 sets no limit: no norm lies above infinity.
        score = (norm - or_infinity(mean)) / (std + self.eps)
        limited = score > self.z
        if not self.settled:
            limited = limited & (count >= self.warmup)
        limit = plus_quotient(mean, self.z * self.z * std, score)
        limits = self.limits_where(limited, limit)
        self._asked = norms, limits
        return limits
