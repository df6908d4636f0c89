"""The last losses of a training, and the limit above which a loss is a spike.

A loss belongs to a step and not to a label, so it has one window, whatever the number of norms. As
a norm, a loss on the CPU is a number and another one a tensor, here 0-d.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .adaptive import RULE, checked_state
from .warm_up import WarmUp
from .window import NormWindow, Row, Rows

NAMES = {"losses": "window", "loss_counts": "counts"}
"""The keys of a saved state, and the names of the same tensors in a `NormWindow`."""


class LossWindow:
    """The last finite losses, and their limit: the mean plus some standard deviations.

    Args:
        factor: How many sample deviations above the mean a loss may be.
        length: How many losses are kept.
        warmup: From which loss on there is a limit, the present one counted.
    """

    def __init__(self, factor: float, length: int, warmup: int) -> None:
        self._factor = factor
        self._warmup = warmup
        self._ring = NormWindow(length)
        self._state: Mapping[str, Tensor] = {}
        self._warm_up: WarmUp | None = None

    def start(self, device: torch.device, dtype: torch.dtype, *, goes_on: bool) -> None:
        """Begin with no loss, or go on with those before, on a device and in a dtype."""
        state = self._ring.fresh(1, device, dtype)
        for name, kept in self._state.items() if goes_on else ():
            state[name].copy_(kept)
        self._state = state
        self._ring.follow(state)
        length = max(self._ring.length, self._warmup)
        self._warm_up = WarmUp(length) if dtype is torch.float64 else None

    def allows(self, loss: Any) -> Any:
        """Return whether a loss is finite and not above the limit; during a warm-up, if finite.

        A missing loss, minus infinity, is allowed. No host sync.

        Args:
            loss: A number, or 0-d.

        Returns:
            True or False; or shape (1,), bool.
        """
        full = False
        if self._warm_up is not None and isinstance(loss, Tensor):
            full = self._warm_up.is_over(self._ring.counts)
        limit = self._ring.limits(loss, self._warmup, self._limit, full=full)
        return (loss <= limit) & (loss < math.inf)  # False for NaN

    def add(self, loss: Any) -> None:
        """Remember the loss of a step, unless it is NaN or infinite. No host sync."""
        if isinstance(loss, Tensor):
            self._ring.add(loss.reshape(1), loss.isfinite().reshape(1))
        elif math.isfinite(loss):
            self._ring.add(loss, None)

    def _limit(self, recent: Row | Rows) -> Any:
        mean, deviation = recent.mean_and_deviation()
        return mean + self._factor * deviation

    # Its state

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the losses and of their number."""
        return {key: self._state[name].clone() for key, name in NAMES.items()}

    def checked(self, rule: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a saved state, empty if it is of a rule that saw no losses.

        Raises:
            StateError: They do not fit this window.
        """
        given = {key: state[key] for key in NAMES if key in state}
        if not given:
            return {}
        needed = {key: self._state[name] for key, name in NAMES.items()}
        return checked_state(rule, needed, {RULE: rule, **given}, signed=("losses",))

    def load(self, checked: Mapping[str, Tensor]) -> None:
        """Load what `checked` returned; nothing begins anew. Host sync."""
        if not checked:
            self._ring.counts.zero_()
        for key, loaded in checked.items():
            self._state[NAMES[key]].copy_(loaded)
        self._ring.follow(self._state)
        if self._warm_up is not None:
            self._warm_up.read(self._ring.counts)
