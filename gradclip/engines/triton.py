"""The engine of Triton kernels for CUDA: one launch measures, one scales what is too large.

The kernels know addresses and lengths alone; what they are to know of a tensor is found out here.
What has no address, and what is to be written with gaps between its elements, is left to the
engine of torch operators.

With ``TRITON_INTERPRET=1`` in the environment, for tests, Triton runs the kernels on the host:
then they serve the CPU and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import compress
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from ..errors import EngineUnavailableError
from . import kernels
from .base import Batch, Engine, capturing, rounded_bounds
from .memory import (
    LOW,
    addresses_of,
    as_it_lies,
    flat,
    flat_view,
    is_narrow,
    table,
    wide_table_view,
)
from .operators import OperatorsEngine
from .plan import BLOCK, Plan, plan
from .tables import Recent, Uploaded

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
INTERPRETED = not isinstance(kernels.change, triton.JITFunction)
DEVICE = "cpu" if INTERPRETED else "cuda"
"""The type of device that is served."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
KEPT = 32
"""Sets of tensors that are remembered: several dtypes and devices, and parameters beside them."""
OLDEST = (7, 0)
"""The oldest compute capability that Triton compiles for."""
AT_ONCE = 8
"""Addresses that one launch of `kernels.write_addresses` takes."""

_OPERATORS = OperatorsEngine()


class TritonEngine(Engine):
    """Measures with one read and writes only what changes; what that is, the device alone knows.

    Args:
        block: Elements that a program takes at a time.
    """

    name = "triton"

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._work: Recent[_Work] = Recent(KEPT)
        self._addresses: Recent[Uploaded] = Recent(KEPT)
        self._arrived: dict[tuple[torch.device, int], Tensor] = {}

    def unserved(self, device: torch.device) -> str | None:
        """See `Engine.unserved`."""
        if device.type != DEVICE:
            interpreter = " where TRITON_INTERPRET is set" if INTERPRETED else ""
            return (
                f"engine='triton' serves devices of type {DEVICE}{interpreter}, and there are "
                f"gradients on {device}: give engine='auto', which chooses for each device."
            )
        if INTERPRETED or _capability(device) >= OLDEST:
            return None
        return (
            "engine='triton' needs compute capability {}.{} or newer, and {} has {}.{} as far as "
            "torch knows: give engine='auto', which takes torch operators there."
        ).format(*OLDEST, device, *_capability(device))

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        if rows and any(map(is_narrow, tensors)):
            return self._power_sums_of_rows(tensors, order)
        request = self._request(tensors, rows, table if rows else flat)
        if request is None:
            return _OPERATORS.power_sums(tensors, order, rows=rows)
        plan = request.plan
        sums = request.new(plan.pieces.shape[0])
        self._measure(request, order, sums)
        if plan.whole:
            return sums
        results = request.new(plan.strips)
        with _on(request.device):
            kernels.strip_sums[(plan.strips,)](
                sums, request.tables[2], results, ORDER=order, **OPTIONS
            )
        return results

    def _power_sums_of_rows(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """Measure rows of which some are narrow, and put the sums into the order of the tensors."""
        narrow = [is_narrow(tensor) for tensor in tensors]
        counts = [len(tensor) for tensor in tensors]
        sums = {}
        for engine, chosen in ((_OPERATORS, True), (self, False)):
            some = [
                tensor for tensor, is_so in zip(tensors, narrow, strict=True) if is_so is chosen
            ]
            own = [count for count, is_so in zip(counts, narrow, strict=True) if is_so is chosen]
            if some:
                sums[chosen] = iter(engine.power_sums(some, order, rows=True).split(own))
        return torch.cat([next(sums[is_so]) for is_so in narrow])

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        request = self._request(tensors, False, flat)
        if request is None:
            return _OPERATORS.norm(tensors, order, scalar=scalar)
        norm = request.new() if scalar else request.new(1)
        self._measure(request, order, request.new(request.plan.programs), norm)
        return norm

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`. The version of every tensor rises, also where nothing is written."""
        self._change(_OPERATORS.scale_, tensors, coefficients, rows, limit=False)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`. The version of every tensor rises, also where nothing is written."""
        bounds = rounded_bounds(bounds, tensors[0].dtype)
        self._change(_OPERATORS.clamp_, tensors, bounds, rows, limit=True)

    def _measure(
        self, request: _Request, order: float, sums: Tensor, norm: Tensor | None = None
    ) -> None:
        """Launch the sums of all pieces, or those of all programs with the norm of all."""
        with _on(request.device):
            kernels.power_sums[(request.plan.programs,)](
                request.addresses,
                *request.tables[:2],
                sums,
                None if norm is None else self._arrivals(request.device),
                norm,
                ORDER=order,
                ELEMENT=request.element,
                BLOCK=self._block,
                TOTAL=norm is not None,
                **OPTIONS,
            )

    def _change(
        self,
        otherwise: Callable[..., None],
        tensors: Sequence[Tensor],
        numbers: Tensor,
        rows: bool,
        *,
        limit: bool,
    ) -> None:
        """Scale or limit what lies without gaps, and do otherwise with the rest."""
        seen = wide_table_view if rows else flat_view
        request = self._request(tensors, rows, seen)
        if request is None:
            fit = [seen(as_it_lies(tensor)) is not None for tensor in tensors]
            if all(fit) or not any(fit):
                otherwise(tensors, numbers, rows=rows)
                return
            for part, own in _parted(tensors, numbers, rows, fit):
                self._change(otherwise, part, own, rows, limit=limit)
            return
        plan = request.plan
        if not len(plan.pieces):
            return
        with _on(request.device):
            kernels.change[(plan.writers,)](
                request.addresses,
                *request.tables[:2],
                numbers.to(torch.float64).contiguous(),
                plan.programs,
                plan.grouped,
                LIMIT=limit,
                ELEMENT=request.element,
                BLOCK=self._block,
                SHARED=numbers.numel() == 1,
                **OPTIONS,
            )
        # Autograd cannot see what was written by address.
        increment_version(tensors)

    def _request(
        self, tensors: Sequence[Tensor], rows: bool, seen: Callable[[Tensor], Tensor | None]
    ) -> _Request | None:
        """Describe to the kernels what lies where; None where a tensor has no address.

        Args:
            tensors: Of one device and dtype.
            rows: Whether row by row.
            seen: Makes what is not contiguous so, or returns None if it cannot.
        """
        if isinstance(tensors, Batch) and isinstance(tensors.note, _Request):
            return tensors.note
        found = addresses_of(tensors, rows, seen)
        if found is None:
            return None
        addresses, held = found
        device = tensors[0].device
        self.check_serves(device)
        lengths, counts, strides = _strips(held, rows)
        captured = capturing()
        work = self._work_of(device, lengths, counts, strides, captured=captured)
        request = _Request(
            device,
            ELEMENTS[tensors[0].dtype],
            work.plan,
            self._sent(device, addresses, captured=captured),
            work.tables.ready_for_ever() if captured else work.tables.ready(),
            held,
        )
        if isinstance(tensors, Batch) and held is tensors:
            request.held = ()  # the tensors themselves
            tensors.note = request
        return request

    def _work_of(self, device: torch.device, *strips: object, captured: bool) -> _Work:
        key = (device, *strips)
        if captured and key not in self._work:
            raise EngineUnavailableError(
                "Gradients of these shapes were not clipped before the CUDA graph was captured, "
                "and what is known of them cannot be sent to the device within: take a few steps "
                "on a side stream first, as torch.cuda.graph asks for."
            )
        return self._work.get(key, lambda: _Work(device, self._block, *strips))

    def _sent(self, device: torch.device, addresses: list[int], *, captured: bool) -> Tensor:
        """Send addresses to the device, unless it has them."""
        if captured:
            return _written_by_kernels(device, addresses)
        key = (device, *addresses)

        def send() -> Uploaded:
            return Uploaded([torch.tensor(addresses, dtype=torch.int64, device="cpu")], device)

        [sent] = self._addresses.get(key, send).ready()
        return sent

    def _arrivals(self, device: torch.device) -> Tensor:
        """Return the count of programs that have ended, 0 again whenever all have."""
        if capturing():
            return torch.zeros(1, dtype=torch.int32, device=device)
        key = (device, 0 if INTERPRETED else torch.cuda.current_stream(device).cuda_stream)
        if key not in self._arrived:
            self._arrived[key] = torch.zeros(1, dtype=torch.int32, device=device)
        return self._arrived[key]


@dataclass(slots=True)
class _Request:
    """What the kernels are told of some tensors."""

    device: torch.device
    element: tl.dtype
    plan: Plan
    addresses: Tensor
    tables: Sequence[Tensor]
    """Those of the plan, on the device."""
    held: Sequence[Tensor]
    """Copies that have the memory, to be kept as long as it is used."""

    def new(self, *shape: int) -> Tensor:
        """Return memory for numbers."""
        return torch.empty(shape, dtype=torch.float64, device=self.device)


class _Work:
    """A plan, with its tables on the device."""

    def __init__(self, device: torch.device, block: int, *strips: Any) -> None:
        _prepare_to_be_captured(device)
        self.plan = plan(*strips, processors=_processors(device), block=block)
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


def _parted(
    tensors: Sequence[Tensor], numbers: Tensor, rows: bool, fit: Sequence[bool]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield the tensors that fit, then the others, each time with their numbers."""
    for chosen in (fit, [not fits for fits in fit]):
        own = numbers
        if numbers.numel() > 1:
            counts = [len(tensor) if rows else 1 for tensor in tensors]
            own = torch.cat([*compress(numbers.split(counts), chosen)])
        yield [*compress(tensors, chosen)], own


def _written_by_kernels(device: torch.device, addresses: list[int]) -> Tensor:
    """Write addresses into a table in a way that a captured graph repeats by itself."""
    # Beyond the end, and where nothing lies, nobody looks; small numbers would be other types.
    wide = [max(address, LOW) for address in addresses] + [LOW] * (-len(addresses) % AT_ONCE)
    table = torch.empty(len(wide), dtype=torch.int64, device=device)
    with _on(device):
        for first in range(0, len(wide), AT_ONCE):
            some = wide[first : first + AT_ONCE]
            kernels.write_addresses[(1,)](table, first, *some, **OPTIONS)
    return table


@cache
def _prepare_to_be_captured(device: torch.device) -> None:
    """Load the one kernel that is launched nowhere but in a capture, within which none can be."""
    _written_by_kernels(device, [LOW])


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, where Triton launches."""
    if INTERPRETED or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@cache
def _processors(device: torch.device) -> int:
    if INTERPRETED:
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
