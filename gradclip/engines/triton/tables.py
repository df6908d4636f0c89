"""Tables of numbers on a device: sent once, kept for the next time, ready on every stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..cuda_graphs import capturing, keep_if_captured

T = TypeVar("T")


class Uploaded:
    """Tables that were sent to a device.

    Args:
        tables: On the host.
        device: Where they are wanted. No host sync.
    """

    def __init__(self, tables: Sequence[Tensor], device: torch.device) -> None:
        self._tables = [_sent(table, device) for table in tables]
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._sent = None if self._stream is None else self._stream.record_event()

    def ready(self) -> list[Tensor]:
        """Return the tables for work on the current stream, which waits for them, not the host.

        A graph that is captured comes after whatever was sent before it.
        """
        keep_if_captured(self)
        if self._stream is not None and self._sent is not None and not capturing():
            stream = torch.cuda.current_stream(self._stream.device)
            if stream != self._stream:
                stream.wait_event(self._sent)
                for table in self._tables:
                    table.record_stream(stream)
        return self._tables


class Recent(Generic[T]):
    """What was made last, by what it was made for.

    Args:
        most: How many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what belongs to a key, made now if it is not there."""
        try:
            found = self._kept[key]
        except KeyError:
            found = self._kept[key] = make()
        # Other threads may have taken the same away.
        with suppress(KeyError):
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


def _sent(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table
    # From pinned memory of its own: what was sent before may still be on its way.
    pinned = torch.empty_like(table, pin_memory=True).copy_(table)
    return pinned.to(device, non_blocking=True)
