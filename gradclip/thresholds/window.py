"""The last norms of each label, for rules that look back over a fixed number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from .adaptive import AdaptiveThreshold
from .arithmetic import is_number

WINDOW, COUNTS = "window", "counts"


class WindowThreshold(AdaptiveThreshold):
    """A rule over the last norms of each label, as measured.

    They are kept in a ring, which costs the same at every step and never grows: k ``length``
    norms and k counts. Places that are still free hold the largest number of the dtype, so that
    they come last in any order.

    Args:
        length: How many norms of a label are kept.
        cap: The threshold is never above it; None for no cap.
        floor: The threshold is never below it; None for no floor.
    """

    def __init__(
        self, length: int, *, cap: float | None = None, floor: float | None = None
    ) -> None:
        super().__init__(cap=cap, floor=floor)
        self._length = length

    def fresh(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `AdaptiveThreshold.fresh`."""
        free, shape = torch.finfo(dtype).max, (count, self._length)
        return {
            WINDOW: torch.full(shape, free, device=device, dtype=dtype),
            COUNTS: torch.zeros(count, device=device, dtype=torch.int64),
        }

    def start(self, labels: Sequence[str], device: torch.device, dtype: torch.dtype) -> None:
        """See `Threshold.start`."""
        self._places = torch.arange(self._length, device=device)
        super().start(labels, device, dtype)

    def rebuild(self) -> None:
        """See `AdaptiveThreshold.rebuild`: free places of another dtype hold its largest number."""
        window = self.state[WINDOW]
        window.masked_fill_(~self.filled(), torch.finfo(window.dtype).max)

    def learn(self, norms: Tensor, clipped_norms: Tensor, observed: Tensor | None) -> None:
        """See `AdaptiveThreshold.learn`: each norm takes the place of the oldest of its label."""
        window, counts = self.state[WINDOW], self.state[COUNTS]
        if is_number(norms) and observed is None:
            ring, place = window.numpy()[0], counts.item() % self._length
            oldest, ring[place] = ring[place].item(), norms.item()
            self.replaced_one(oldest, ring[place].item())
            counts += 1
            return
        places = (counts % self._length).unsqueeze(1)
        oldest, newest = window.gather(1, places), norms.unsqueeze(1)
        if observed is not None:
            newest = torch.where(observed.unsqueeze(1), newest, oldest)
        window.scatter_(1, places, newest)
        self.replaced(oldest, newest)
        counts += 1 if observed is None else observed

    def replaced(self, oldest: Tensor, newest: Tensor) -> None:
        """Hear which norms left the window and which entered it, both of shape (k, 1).

        A free place that was taken is the largest number of the dtype.
        """

    def replaced_one(self, oldest: float, newest: float) -> None:
        """Hear the same where there is one label on the CPU."""

    def kept(self) -> Tensor:
        """Return how many norms of each label the window holds; shape (k,), int64."""
        return self.state[COUNTS].clamp(max=self._length)

    def kept_numbers(self) -> NDArray[Any]:
        """Return the norms that the window holds, where there is one label on the CPU."""
        count = self.state[COUNTS].item()
        return self.state[WINDOW].numpy()[0, : min(int(count), self._length)]

    def filled(self) -> Tensor:
        """Return which places are taken; shape (k, length), bool."""
        return self._places < self.state[COUNTS].unsqueeze(1)
