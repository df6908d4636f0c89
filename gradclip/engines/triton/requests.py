"""What the Triton kernels are told of tensors: where they lie, and which program takes what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..base import TensorList
from ..cuda_graphs import capturing
from ..layout import addresses_of
from .launching import INTERPRETED, not_captured, processors, written_by_kernels
from .plan import Plan, plan
from .tables import Recent, Uploaded

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
KEPT = 32
"""Sets of tensors that are remembered: several dtypes and devices, and parameters beside them."""


@dataclass(slots=True)
class Request:
    """Some tensors of one device and dtype, as the kernels know them."""

    device: torch.device
    element: tl.dtype
    block: int
    plan: Plan
    addresses: Tensor
    tables: Sequence[Tensor]
    """Those of the plan, on the device."""
    held: Sequence[Tensor]
    """Copies that have the memory, to be kept as long as it is used."""

    def new(self, *shape: int) -> Tensor:
        """Return memory for numbers."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)


class Requests:
    """Makes requests, and remembers what was sent to devices for them.

    Args:
        block: Elements that a program takes at a time.
        check_serves: Raises where a device is not served.
    """

    def __init__(self, block: int, check_supported: Callable[[torch.device], None]) -> None:
        self._block = block
        self._check_serves = check_supported
        self._work: Recent[_Work] = Recent(KEPT)
        self._addresses: Recent[Uploaded] = Recent(KEPT)
        self._arrived: dict[tuple[torch.device, int], Tensor] = {}

    def of(
        self, tensors: Sequence[Tensor], rows: bool, seen: Callable[[Tensor], Tensor | None]
    ) -> Request | None:
        """Describe tensors; None where one has no address. No host sync.

        Args:
            tensors: Of one device and dtype.
            rows: Whether row by row.
            seen: Makes what is not contiguous so, or returns None if it cannot.

        Raises:
            EngineUnavailableError: Their device is not served, or a step is captured in a CUDA
                graph before one with such gradients was taken.
        """
        if isinstance(tensors, TensorList) and isinstance(tensors.note, Request):
            return tensors.note
        found = addresses_of(tensors, rows, seen)
        if found is None:
            return None
        addresses, held = found
        device = tensors[0].device
        self._check_serves(device)
        work = self._work_of(device, *_strips(held, rows))
        request = Request(
            device,
            ELEMENTS[tensors[0].dtype],
            self._block,
            work.plan,
            self._sent(device, addresses),
            work.tables.ready(),
            held,
        )
        if isinstance(tensors, TensorList) and held is tensors:
            request.held = ()  # the tensors themselves
            tensors.note = request
        return request

    def arrivals(self, device: torch.device) -> Tensor:
        """Return the count of programs that have ended, 0 again whenever all have.

        Kernels that may run at the same time count apart: those of each stream, and of each graph.
        """
        if capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        key = (device, 0 if INTERPRETED else torch.cuda.current_stream(device).cuda_stream)
        if key not in self._arrived:
            self._arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._arrived[key]

    def _work_of(self, device: torch.device, *strips: object) -> _Work:
        key = (device, *strips)
        if capturing() and key not in self._work:
            raise not_captured("of these shapes")
        return self._work.get(key, lambda: _Work(device, self._block, *strips))

    def _sent(self, device: torch.device, addresses: list[int]) -> Tensor:
        """Send addresses to the device, unless it has them."""
        if capturing():
            return written_by_kernels(device, addresses)

        def send() -> Uploaded:
            return Uploaded([torch.tensor(addresses, dtype=torch.int64, device="cpu")], device)

        [sent] = self._addresses.get((device, *addresses), send).ready()
        return sent


class _Work:
    """A plan, with its tables on the device."""

    def __init__(self, device: torch.device, block: int, *strips: Any) -> None:
        self.plan = plan(*strips, processors=processors(device), block=block)
        self.tables = Uploaded(self.plan.tables, device)


def _strips(held: Sequence[Tensor], rows: bool) -> tuple[tuple[int, ...] | None, ...]:
    """Return length, count and stride of the strips of tensors."""
    if not rows:
        return tuple(map(Tensor.numel, held)), None, None
    return (
        tuple(view.shape[1] for view in held),
        tuple(map(len, held)),
        tuple(view.stride(0) for view in held),
    )
