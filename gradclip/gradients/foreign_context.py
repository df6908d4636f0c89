"""The context of a step as a user's own rule gets it.

Its tensors are copies, which the rule may write to. Its loss is refused where other ranks have
another one: a rule that need not have a loss is asked only when it reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..ranks.groups import NormRanks
from ..ranks.shared_loss import check_reach, reaches_all
from ..records.record import as_vector
from ..thresholds import StepContext, Threshold


def foreign_context(context: StepContext, rule: Threshold, norm_ranks: NormRanks) -> StepContext:
    """Return a context of tensors that a user's own rule may write to.

    Args:
        context: The context of the step.
        rule: The rule, for the error that reading a loss of this rank alone raises.
        norm_ranks: The ranks that the norms span, and with them the loss.
    """
    present, loss = context.present.clone(), context.loss
    if loss is None:
        return replace(context, present=present)
    if norm_ranks.across is None and not reaches_all(norm_ranks):
        return _OwnLossContext(
            context.step,
            present,
            context.order,
            context.weight_norms,
            lambda: check_reach(repr(rule), norm_ranks),
        )
    loss = as_vector(loss).squeeze(0) if isinstance(loss, float) else loss.clone()
    return replace(context, present=present, loss=loss)


class _OwnLossContext(StepContext):
    """A context whose ``loss`` raises: it is that of this rank, and others may have another."""

    __slots__ = ("_refuse",)
    _refuse: Callable[[], None]

    @property
    def loss(self) -> Any:
        return self._refuse()

    @loss.setter
    def loss(self, refuse: Callable[[], None]) -> None:
        self._refuse = refuse
