"""A threshold at a percentile of recent norms: AutoClip."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_percentile, checked_positive
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .numbers import NumberOrTensor, as_floats, clamped, numbers_or_tensors, scaled
from .window import NormWindow, OrderedNorms


class Percentile(AdaptiveThreshold):
    """A multiple of a percentile of the last norms, the current one included: AutoClip.

    ``threshold = factor percentile(p, last norms and the current one)``, linear between two norms
    as ``numpy.percentile`` has it: Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive
    Gradient Clipping for Source Separation Networks" (2020), arXiv:2007.14469. The paper has no
    factor. It uses all norms so far, and so does a window until it is full. On norms that do not
    drift, the tenth percentile clips about 90 % of the steps; a factor above 1 lets the usual ones
    pass. bitsandbytes' percentile clipping is ``Percentile(5, window=100)`` with the scope
    "parameter".
    <!-- test: tests/contracts/rules/test_papers.py -k percentile_is;
    tests/contracts/rules/test_contract.py; tests/behaviour/thresholds/test_pairs.py -k autoclip -->

    It observes norms as measured. There is no warm-up: the first norm is its own percentile, and
    is not clipped, unless the factor is below 1. A current norm that is not finite, or without a
    gradient, is ignored; without any norm there is no limit.
    <!-- test: tests/contracts/rules/test_papers.py -k percentile -->

    Norms of 0 count, as in the paper: where more of them than the percentile are 0, as in units
    that are mostly idle, the threshold is 0 and erases the others. ``floor=`` prevents it.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k idle -->

    Memory: ``k (2 window + 1)`` norms and ``k`` counts.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        percentile: From 0 to 100.
        window: How many of the last norms of a label it uses, the current one included; 2 or more.
        factor: The threshold as a multiple of the percentile, above 0.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range.
    """

    observes_clipped = False

    def __init__(
        self,
        percentile: float = 10.0,
        window: int = 1000,
        *,
        factor: float = 1.0,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        self.percentile = checked_percentile(percentile)
        self.window = checked_count("window", window, least=2)
        self.factor = checked_positive("factor", factor)
        super().__init__(cap=cap, floor=floor)
        self.settles_after = self.window - 1
        self._ring = NormWindow(self.window - 1)  # the current norm is the last of the window
        self._ordered = OrderedNorms(self._ring.norms)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return self._ring.fresh(count, device, dtype)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        self._ring.follow(self.state)
        if not self._ordered.fits(self._ring.norms):
            self._ordered = OrderedNorms(self._ring.norms)
        self._ordered.sort_(self._ring.norms)
        # Of full windows, with the present norm and without it.
        (rank, share), (rank_alone, share_alone) = map(self._place, (self.window, self.window - 1))
        self._bounds = self._ordered.around(int(rank))
        self._alone = self._ordered.around(int(rank_alone))[1]
        self._shares = [self._ring.norms.new_full((1,), value) for value in (share, share_alone)]

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return scaled(self._percentiles(norms, context), self.factor)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        self._ordered.replace_(*self._ring.add(norms, observed))

    def _percentiles(self, norms: Any, context: StepContext) -> Any:
        norm, present, count = numbers_or_tensors(norms, context.present, self._ring.counts)
        usable = present & (norm < math.inf) if context.usable is None else context.usable
        if self.settled:
            return self._percentiles_of_full_windows(norm, usable)
        count = clamped(count, high=self._ring.length) + usable
        # A label without any norm is computed like one with a single norm, and has no limit.
        rank, fraction = self._place(as_floats(clamped(count, low=1), norms))
        # An infinite norm comes last, beyond every rank that is asked for.
        lower, upper = self._ordered.with_another(rank, self.limits_where(usable, norm))
        return self.limits_where(count > 0, lower + (upper - lower) * fraction)

    def _place(self, count: Any) -> tuple[Any, Any]:
        """Return where the percentile of so many norms lies: a rank, and a share beyond it."""
        position = (count - 1) * (self.percentile / 100)
        return position // 1, position % 1

    def _percentiles_of_full_windows(self, norms: Tensor, usable: Tensor) -> Tensor:
        """Return percentiles where one of two ranks is asked for, as the host knows the counts."""
        pair: Any = torch.where(usable, torch.clamp(norms, *self._bounds), self._alone)
        lower, upper = pair.unbind()
        percentiles: Tensor = lower + (upper - lower) * torch.where(usable, *self._shares)
        return percentiles
