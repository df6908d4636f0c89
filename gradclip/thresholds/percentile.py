"""A percentile of the norms so far: AutoClip."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import checked_count, checked_percentile
from .arithmetic import NumberOrTensor, is_number
from .base import StepContext
from .window import COUNTS, WINDOW, Ordered, WindowThreshold


class Percentile(WindowThreshold):
    """A percentile of the last norms, the current one included: AutoClip.

    ``threshold = percentile(p, last norms and the current one)``, linear between two norms as
    ``numpy.percentile`` has it: Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: Adaptive
    Gradient Clipping for Source Separation Networks" (2020), arXiv:2007.14469. The paper looks at
    all norms so far, which a window equals until it is full. On norms that do not drift, the
    tenth percentile clips about 90 % of the steps. bitsandbytes' percentile clipping is
    ``Percentile(5, window=100)`` with the scope "parameter".

    It observes norms as measured. There is no warm-up: the first norm is its own percentile, and
    is not clipped. A current norm that is not finite, or without a gradient behind it, is left
    out; without any norm there is no limit.

    Norms of 0 count as the paper has it: where more of them than the percentile are 0, as in units
    that are mostly idle, the threshold is 0 and erases the others. ``floor=`` prevents it.

    Memory: ``k (2 window + 1)`` norms and ``k`` counts.

    Args:
        percentile: From 0 to 100.
        window: How many norms of a label it looks at, the current one included; 2 or more.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number that cannot be meant.
    """

    def __init__(
        self,
        percentile: float = 10.0,
        window: int = 1000,
        *,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        self.percentile = checked_percentile(percentile)
        self.window = checked_count("window", window, least=2)
        super().__init__(self.window - 1, cap=cap, floor=floor)
        self._ordered = Ordered(torch.empty(0, self.window - 1, device="cpu"))

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        super().rebuild()
        window = self.state[WINDOW]
        if not self._ordered.fits(window):
            self._ordered = Ordered(window)
        self._ordered.sort_(window)

    def limits(self, norms: Tensor, context: StepContext) -> Tensor:
        """See `Rule.limits`."""
        if is_number(norms):
            present = bool(context.present.item())
            return torch.full_like(norms, self._limit_of_one(norms.item(), present))
        counted = context.present & (norms < math.inf)
        count = self.kept() + counted
        rank, fraction = self._place(count.clamp(min=1).to(norms.dtype))
        current = torch.where(counted, norms, torch.finfo(norms.dtype).max)
        lower, upper = self._ordered.with_another(rank.long(), current)
        return torch.where(count > 0, lower + (upper - lower) * fraction, math.inf)

    def _limit_of_one(self, norm: float, present: bool) -> float:
        counted = present and norm < math.inf
        count = min(int(self.state[COUNTS].item()), self._length) + counted
        if not count:
            return math.inf
        rank, fraction = self._place(float(count))
        lower, upper = self._ordered.one_with_another(int(rank), norm if counted else math.inf)
        return lower + (upper - lower) * fraction

    def _place(self, count: NumberOrTensor) -> tuple[NumberOrTensor, NumberOrTensor]:
        """Return the rank at or below the percentile of so many norms, and how far above it is."""
        position = (count - 1) * (self.percentile / 100)
        return position // 1, position % 1

    def replaced_one(self, oldest: float, newest: float) -> None:
        """See `WindowThreshold.replaced_one`."""
        self._ordered.replace_one_(oldest, newest)

    def replaced(self, oldest: Tensor, newest: Tensor) -> None:
        """See `WindowThreshold.replaced`."""
        self._ordered.replace_(oldest, newest)
