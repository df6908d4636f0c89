"""The end of a rule's warm-up, of which the host learns without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engines.base import host_may_read
from ..engines.cuda_graphs import capturing

ANSWERS = "cuda"
"""The type of device whose copies the host can find to have arrived."""


class WarmUp:
    """Whether the warm-up of a rule is over for all labels, as far as the host knows.

    A rule whose labels may be in their warm-up or past it computes both and chooses on the device;
    past it, half of the operators do. How many norms a label has seen only the device knows, since
    norms that are not finite do not count. So the answer is copied to pinned memory, and read at a
    later step once it has arrived. Both ways of a rule give the same bits.

    The warm-up never ends on a device other than CUDA, whose copies nobody awaits, nor within the
    capture of a CUDA graph: an earlier state may be loaded before its replays.

    Args:
        length: How many norms of each label it lasts.
        least: What a count is at least once it is over; None for the length.
    """

    def __init__(self, length: int, least: float | None = None) -> None:
        self._length = length
        self._least = length if least is None else least
        self._over = False
        self._answer: Answer | None = None
        """The answer of the device while it is on its way."""
        self._steps = 0
        """Steps since the start or the last question."""

    def is_over(self, counts: Tensor) -> bool:
        """Return whether it is over; called once a step. No host sync.

        Args:
            counts: How many norms of each label were observed, or what tells it; shape (k,).
        """
        if capturing():
            return False
        if self._answer is not None and self._answer.arrived():
            self._over, self._answer = self._answer.value(), None
        elif self._answer is None and not self._over:
            self._steps += 1
            if self._steps > self._length:
                self._ask(counts)
        return self._over

    def read(self, counts: Tensor) -> None:
        """Read at once whether it is over. Host sync."""
        self._over, self._answer = bool(self._past(counts)), None

    def _ask(self, counts: Tensor) -> None:
        self._steps = 0
        if type(counts) is not Tensor:
            return  # a FakeTensor has no values, wherever it says it is
        if host_may_read(counts):
            self.read(counts)
        elif counts.device.type == ANSWERS:
            self._answer = Answer(self._past(counts))

    def _past(self, counts: Tensor) -> Tensor:
        return (counts >= self._least).all()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copied rule needs: an event of CUDA cannot be copied."""
        return {**vars(self), "_answer": None}


class Answer:
    """A flag on its way from a CUDA device to the host.

    Args:
        flag: 0-d, bool.
    """

    def __init__(self, flag: Tensor) -> None:
        # "cpu" by name, as the default device may be another one.
        host = torch.empty_like(flag, device="cpu", pin_memory=True)
        self._host = host.copy_(flag, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(flag.device))

    def arrived(self) -> bool:
        """Return whether `value` is known by now."""
        return bool(self._event.query())

    def value(self) -> bool:
        """Return the flag, after it has arrived."""
        return bool(self._host)
