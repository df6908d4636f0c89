"""Requests to the Triton kernels: tables on the device with addresses and shares of the work.

Tables are uploaded once and kept for the next step, since a copy to the device takes longer than
the launch that reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from ..base import TensorList
from ..cuda_graphs import capturing, keep_if_captured
from ..layout import addresses_of
from ..shared_memory import sharing
from .launching import INTERPRETED, not_captured, processors, written_by_kernels
from .plan import Plan, plan

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
KEPT = 32
"""Lists of tensors to remember: a step has some for each dtype and device, and for parameters."""

T = TypeVar("T")


@dataclass(slots=True)
class Request:
    """Some tensors of one device and dtype, in the form that kernels need."""

    device: torch.device
    element: tl.dtype
    block: int
    plan: Plan
    addresses: Tensor
    """Shape (tensors,), int64, on the device."""
    tables: Sequence[Tensor]
    """The tables of the plan, on the device."""
    stored: Sequence[Tensor]
    """The tensors at these addresses, copies among them, to be kept alive."""
    is_apart: bool
    """True if no tensor shares memory with another; found once for each list of addresses."""

    def new(self, *shape: int) -> Tensor:
        """Return uninitialised float64 memory on the device."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)


class Requests:
    """Makes requests, and remembers what it has uploaded for them.

    Args:
        block: Elements that a program takes at a time.
        check_supported: Raises if a device is not supported.
    """

    def __init__(self, block: int, check_supported: Callable[[torch.device], None]) -> None:
        self._block = block
        self._check_supported = check_supported
        self._plans: Recent[tuple[Plan, Uploaded]] = Recent(KEPT)
        self._addresses: Recent[tuple[Uploaded, bool]] = Recent(KEPT)
        self._scratch: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}

    def of(
        self,
        tensors: Sequence[Tensor],
        rows: bool,
        view: Callable[[Tensor], Tensor | None],
        *,
        divide: bool = True,
    ) -> Request | None:
        """Return a request for tensors, or None if one has no address. No host sync.

        Args:
            tensors: Tensors of one device and dtype.
            rows: Whether each index of dimension 0 has a number of its own.
            view: Returns a contiguous form of a tensor, or None if there is none.
            divide: Whether two programs may share a strip, see `plan`.

        Raises:
            EngineUnavailableError: The device is not supported, or a CUDA graph is captured before
                any step with gradients of these shapes.
        """
        if isinstance(tensors, TensorList) and isinstance(tensors.note, Request):
            return tensors.note
        located = addresses_of(tensors, rows, view)
        if located is None:
            return None
        addresses, stored = located
        device = tensors[0].device
        self._check_supported(device)
        strips = _strips(stored, rows)
        work, tables = self._plan_of(device, *strips, divide)
        table, is_apart = self._uploaded(stored, addresses, strips)
        request = Request(
            device,
            ELEMENTS[tensors[0].dtype],
            self._block,
            work,
            table,
            tables.ready(),
            stored,
            is_apart,
        )
        if isinstance(tensors, TensorList) and stored is tensors:
            # No reference back to the list: a cycle would keep gradients alive until a collection.
            request.stored = ()
            tensors.note = request
        return request

    def scratch(self, device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
        """Return memory for a sum of each program, and the counter of programs that have ended.

        The last program sets the counter back to 0. Kernels that may run at the same time need both
        of their own: one for each stream, and one for each graph.
        """
        if capturing():
            return _scratch(device, programs)
        key = (device, 0 if INTERPRETED else torch.cuda.current_stream(device).cuda_stream)
        kept = self._scratch.get(key)
        if kept is None or kept[0].numel() < programs:
            kept = self._scratch[key] = _scratch(device, programs)
        return kept

    def _plan_of(
        self,
        device: torch.device,
        lengths: tuple[int, ...],
        counts: tuple[int, ...] | None,
        strides: tuple[int, ...] | None,
        divide: bool,
    ) -> tuple[Plan, Uploaded]:
        key = (device, lengths, counts, strides, divide)
        # An upload inside a capture would be replayed, from host memory that may be gone by then.
        if capturing() and key not in self._plans:
            raise not_captured("of these shapes")

        def make() -> tuple[Plan, Uploaded]:
            sizes = {"processors": processors(device), "block": self._block}
            work = plan(lengths, counts, strides, divide=divide, **sizes)
            return work, Uploaded(work.tables, device)

        return self._plans.get(key, make)

    def _uploaded(
        self, stored: Sequence[Tensor], addresses: list[int], strips: Hashable
    ) -> tuple[Tensor, bool]:
        """Return the addresses on the device, uploaded unless they are there, and `is_apart`."""
        device = stored[0].device
        if capturing():
            return written_by_kernels(device, addresses), not sharing(stored)

        def upload() -> tuple[Uploaded, bool]:
            table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            return Uploaded([table], device), not sharing(stored)

        uploaded, is_apart = self._addresses.get((device, strips, *addresses), upload)
        [table] = uploaded.ready()
        return table, is_apart


def _scratch(device: torch.device, programs: int) -> tuple[Tensor, Tensor]:
    sums = torch.empty(programs, dtype=torch.float64, device=device)
    return sums, torch.zeros(1, dtype=torch.int32, device=device)


def _strips(
    stored: Sequence[Tensor], rows: bool
) -> tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the length, the count and the stride of the strips of each tensor."""
    if not rows:
        return tuple(map(Tensor.numel, stored)), None, None
    return (
        tuple(matrix.shape[1] for matrix in stored),
        tuple(map(len, stored)),
        tuple(matrix.stride(0) for matrix in stored),
    )


class Uploaded:
    """Tables that were copied to a device, for use on any stream.

    Args:
        tables: On the host.
        device: Where to copy them. No host sync.
    """

    def __init__(self, tables: Sequence[Tensor], device: torch.device) -> None:
        self._tables = [_copied(table, device) for table in tables]
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._copied = None if self._stream is None else self._stream.record_event()

    def ready(self) -> list[Tensor]:
        """Return the tables; the current stream waits for them, and the host does not.

        A graph that is captured needs no wait: it is replayed after everything copied before.
        """
        keep_if_captured(self)
        if self._stream is not None and self._copied is not None and not capturing():
            stream = torch.cuda.current_stream(self._stream.device)
            if stream != self._stream:
                stream.wait_event(self._copied)
                for table in self._tables:
                    # Or the allocator gives the memory away while this stream still reads it.
                    table.record_stream(stream)
        return self._tables


def _copied(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table
    # Pinned memory of its own: an earlier copy from a shared buffer may still be under way.
    pinned = torch.empty_like(table, pin_memory=True).copy_(table)
    return pinned.to(device, non_blocking=True)


class Recent(Generic[T]):
    """The most recently used values, by key.

    Args:
        most: How many to keep.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, made now if there is none."""
        try:
            value = self._values[key]
        except KeyError:
            value = self._values[key] = make()
        # Another thread may have removed the key in between.
        with suppress(KeyError):
            self._values.move_to_end(key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        return value
