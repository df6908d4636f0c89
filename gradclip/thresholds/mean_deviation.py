"""A threshold above the mean of recent norms, and losses, by several deviations: OLMo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import checked_count, checked_positive
from ..errors import ArgumentError
from .adaptive import AdaptiveThreshold
from .base import StepContext
from .loss_window import NAMES, LossWindow
from .numbers import NumberOrTensor, as_limits, where
from .window import NormWindow, Row, Rows


class MeanDeviation(AdaptiveThreshold):
    """A limit some standard deviations above the mean of the last norms.

    ``threshold = mean + factor std`` of the last norms, without the current one, with the sample
    deviation (n - 1): the rule by which OLMo-core skips steps (6 deviations over 128 norms, with
    ``exceed="skip"``), levanter's update clipping and PyPI's StandardClip.
    <!-- test: tests/contracts/rules/test_papers.py -k deviations_are;
    tests/contracts/rules/test_contract.py -->

    It observes norms as measured, those of skipped steps too, as OLMo-core does: a level that rises
    for good is followed. One spike raises the limit for as long as the window holds it;
    `MedianDeviation` does not have this weakness. There is no limit before norm number ``warmup``,
    the current one counted, and never one before the third, since a deviation needs two.
    <!-- test: tests/behaviour/thresholds/test_pairs.py -k 'blinds or rise_for_good' -->

    With ``loss=True`` it is OLMo-core's whole rule: the same limit holds for the losses, and at a
    step whose loss is above it all thresholds are 0, whatever the floor. ``exceed="skip"`` then
    skips the step, if one of its norms is above 0; ``exceed="scale"`` is refused, as it would set
    the gradients to 0. A loss that is NaN or infinite is above every limit, from the first step on,
    and is not remembered; losses of skipped steps are. Every step needs a loss, assigned as
    ``clipper.loss`` or returned by the closure. Across ranks their mean decides.
    <!-- test: tests/contracts/rules/test_losses.py; tests/behaviour/thresholds/test_loss_rule.py;
    tests/ranks/test_losses.py -->

    Memory: ``k window`` norms and ``k`` counts; with ``loss=True`` another ``window`` losses.
    <!-- test: tests/contracts/rules/test_contract.py -k size -->

    Args:
        factor: How many standard deviations above the mean a norm may be, above 0.
        window: How many of the last norms of a label it uses, 2 or more.
        warmup: From which norm of a label on there is a limit; None for half the window.
        loss: True to skip steps whose loss is above the mean of the last losses by as many
            standard deviations.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.

    Raises:
        ArgumentError: A number is out of its range, or ``loss`` is neither True nor False.
    """

    observes_clipped = False

    def __init__(
        self,
        factor: float = 6.0,
        window: int = 128,
        warmup: int | None = None,
        *,
        loss: bool = False,
        cap: float | None = None,
        floor: float | None = None,
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self.factor = checked_positive("factor", factor)
        self.window = checked_count("window", window, least=2)
        self.warmup = window // 2 if warmup is None else checked_count("warmup", warmup)
        if not isinstance(loss, bool):
            raise ArgumentError(
                f"loss is {loss!r}: give True or False, and the loss of each step as clipper.loss."
            )
        self.loss = self.needs_loss = self.needs_skip = loss
        self._losses = LossWindow(self.factor, self.window, self.warmup) if loss else None
        self._ring = NormWindow(self.window)
        self.settles_after = max(self.window, self.warmup)

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        return self._ring.fresh(count, device, dtype)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`."""
        self._ring.follow(self.state)

    def limits(self, norms: NumberOrTensor, context: StepContext) -> NumberOrTensor:
        """See `Rule.limits`."""
        return self._ring.limits(norms, self.warmup, self._limit, full=self.settled)  # type: ignore[no-any-return]

    def learn(
        self, norms: NumberOrTensor, clipped_norms: NumberOrTensor, observed: Tensor | None
    ) -> None:
        """See `AdaptiveThreshold.learn`."""
        self._ring.add(norms, observed)

    # The losses

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`. Losses stay where the present labels do."""
        goes_on = bool(self.state) and tuple(labels[: len(self._labels)]) == self._labels
        super().start(labels, device, dtype)
        if self._losses is not None:
            self._losses.start(device, dtype, goes_on=goes_on)

    def thresholds(self, norms: Any, context: StepContext) -> Any:
        """See `Threshold.thresholds`."""
        limits = super().thresholds(norms, context)
        if self._losses is None:
            return limits
        # After cap and floor, which bound norms: a spike of the loss lets none pass.
        return where(self._losses.allows(context.loss), limits, as_limits(0.0, norms))

    def observe(self, norms: Any, clipped_norms: Any, context: StepContext) -> None:
        """See `Threshold.observe`."""
        super().observe(norms, clipped_norms, context)
        if self._losses is not None:
            self._losses.add(context.loss)

    def state_dict(self) -> dict[str, Any]:
        """See `Threshold.state_dict`."""
        losses = {} if self._losses is None else self._losses.state_dict()
        return {**super().state_dict(), **losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Threshold.load_state_dict`. A state without losses loads; they begin anew."""
        if self._losses is None or not isinstance(state, Mapping):
            super().load_state_dict(state)
            return
        checked = self._losses.checked(type(self).__name__, state)
        super().load_state_dict({key: state[key] for key in state if key not in NAMES})
        self._losses.load(checked)

    def _limit(self, recent: Row | Rows) -> Any:
        mean, deviation = recent.mean_and_deviation()
        return mean + self.factor * deviation
