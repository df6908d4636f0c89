"""The engine of torch operators: the CPU, and any device without an engine of its own.

Two ways, because the host may look at a CPU tensor for free and must never look at another:

On the CPU large tensors are condensed first. A row of 256 elements becomes its norm, in the
gradient's own vector code at memory speed; a sum of so few squares keeps 1e-6 on constant
data too, where the rounding of longer runs adds up. The norms of the rows, beside small
tensors as they are, then go through one float64 segment sum. Whatever comes out of range of
float32 (too large, or so small that squares vanish) is summed once more in float64.

Elsewhere the sums are torch's multi-tensor norms with float64 accumulation, and nothing here
waits for the device.

Only operators that obey neither autocast nor the matmul precision nor a default device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .base import INFINITY, Engine, norm_dtype
from .memory import exclusive, overlaps, storage_order

ROW = 256
"""Elements summed in the gradient's own precision before float64 takes over."""
SMALL = 4096
"""Tensors up to this length are converted to float64 as they are: cheaper than condensing."""
CHUNK = 1 << 18
"""Half-precision elements converted to float32 at a time: 1 MiB, which stays in cache."""
TINY = 2.0**-51
"""Below this mean magnitude squares may vanish in float32 (smallest normal: 2**-126)."""
WIDE = (torch.float64, torch.complex128)
SMALLEST_NORMAL = 2.0**-126


class OperatorsEngine(Engine):
    """Measures with one read and writes only what changes, in torch operators alone."""

    name = "operators"

    def power_sums(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """See `Engine.power_sums`."""
        if tensors[0].device.type == "cpu":
            return _host_power_sums(tensors, order)
        return _device_power_sums(tensors, order)

    def scale_(self, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
        """See `Engine.scale_`. Off the CPU it multiplies always, since looking would wait."""
        if tensors[0].device.type == "cpu":
            _host_scale_(tensors, coefficients)
        else:
            _device_scale_(tensors, coefficients)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor) -> None:
        """See `Engine.clamp_`. Off the CPU it writes always, since looking would wait."""
        each = bounds.expand(len(tensors))
        if tensors[0].device.type == "cpu":
            _host_clamp_(tensors, each.tolist())
            return
        for tensor, bound in zip(tensors, each.unbind(), strict=True):
            with exclusive(tensor) as memory:
                memory.clamp_(-bound, bound)


# On the CPU


def _host_power_sums(tensors: Sequence[Tensor], order: float) -> Tensor:
    pieces: list[Tensor] = []
    lengths: list[int] = []
    for tensor in tensors:
        length = tensor.numel()
        if length > SMALL:
            condensed = _condense(tensor, order)
            pieces += condensed
            length = sum(piece.numel() for piece in condensed)
        else:
            pieces.append(tensor)
        lengths.append(length)
    sums = _segment_sums(pieces, tuple(lengths), order)
    smallest = TINY if order == INFINITY else TINY**order
    for index, total in enumerate(sums.tolist()):
        if not smallest * tensors[index].numel() <= total < INFINITY:
            _sum_again(tensors[index], order, sums[index])
    return sums


def _condense(tensor: Tensor, order: float) -> list[Tensor]:
    """Return short tensors with the same power sum, at the price of one read."""
    flat = storage_order(tensor)
    if flat is None or order not in (1, 2, INFINITY):
        return [torch.linalg.vector_norm(tensor, order, dtype=torch.float64).view(1)]
    if order == INFINITY:
        return [*torch.aminmax(flat)]
    if flat.dtype in (torch.float32, torch.float64):
        return _condense_rows(flat, order)
    return _condense_half(flat, order)


def _condense_rows(flat: Tensor, order: float) -> list[Tensor]:
    rows, rest = divmod(flat.numel(), ROW)
    if not rest:
        return [torch.linalg.vector_norm(flat.view(rows, ROW), order, 1)]
    body, tail = flat.split((rows * ROW, rest))
    return [torch.linalg.vector_norm(body.view(rows, ROW), order, 1), tail]


def _condense_half(flat: Tensor, order: float) -> list[Tensor]:
    pieces: list[Tensor] = []
    buffer = torch.empty(min(CHUNK, flat.numel()), dtype=torch.float32, device=flat.device)
    for chunk in flat.split(CHUNK):
        condensed = _condense_rows(buffer[: chunk.numel()].copy_(chunk), order)
        # The tail is a view of the buffer that the next chunk overwrites.
        pieces += [condensed[0], *(tail.clone() for tail in condensed[1:])]
    return pieces


def _segment_sums(pieces: list[Tensor], lengths: tuple[int, ...], order: float) -> Tensor:
    values = _flatten_dense_tensors(pieces).to(torch.float64, copy=True)
    segments = _segment_lengths(lengths)
    if order == INFINITY:
        return torch.segment_reduce(values.abs_(), "max", lengths=segments, initial=0, unsafe=True)
    powers = values.mul_(values) if order == 2 else values.abs_().pow_(order)
    return torch.segment_reduce(powers, "sum", lengths=segments, unsafe=True)


@lru_cache(maxsize=64)
def _segment_lengths(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device="cpu")


def _sum_again(tensor: Tensor, order: float, into: Tensor) -> None:
    """Replace a sum that left the range of float32, or was never a number, by a float64 one."""
    if not tensor.numel():
        return
    magnitudes = tensor
    if tensor.dtype in _DENORMALS and _flushes_denormals():
        magnitudes = _with_denormals(tensor)
    elif tensor.numel() <= SMALL or not any(torch.aminmax(tensor)):
        return  # summed in float64 before, or all zero
    norm = torch.linalg.vector_norm(magnitudes, order, dtype=torch.float64)
    into.copy_(norm if order == INFINITY else norm.pow_(order))


# What a float is when its exponent bits are zero: its mantissa times the smallest subnormal.
_DENORMALS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 1 << 23, 2.0**-149),
    torch.bfloat16: (torch.int16, 0x7FFF, 1 << 7, 2.0**-133),
}


def _flushes_denormals() -> bool:
    smallest = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
    return float(smallest.double()) == 0


def _with_denormals(tensor: Tensor) -> Tensor:
    """Return the magnitudes in float64, read from the bits where arithmetic would see 0."""
    integers, mask, first_normal, smallest = _DENORMALS[tensor.dtype]
    bits = tensor.contiguous().view(integers) & mask
    return torch.where(bits < first_normal, bits.double() * smallest, tensor.double().abs())


def _host_scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    if coefficients.numel() == 1:
        _scale_all_(tensors, coefficients.item())
        return
    for tensor, coefficient in zip(tensors, coefficients.tolist(), strict=True):
        _scale_all_([tensor], coefficient)


def _scale_all_(tensors: Sequence[Tensor], coefficient: float) -> None:
    wide = tensors[0].dtype in WIDE
    dtype = torch.float64 if wide else torch.float32
    # A product is computed in float32 for narrower gradients, where such a factor is 1.
    if coefficient >= (1 if wide else 1 - 2.0**-25):
        return
    factors = [coefficient]
    if coefficient < SMALLEST_NORMAL and not wide:
        # Not a normal float32 number: where denormals are flushed it would be 0.
        factors = [2.0**-64, coefficient * 2.0**64]
    # A 0-d tensor is not rounded to the gradients' dtype, as a Python number is for float16.
    multipliers = [torch.tensor(factor, dtype=dtype, device="cpu") for factor in factors]
    separate = [tensor for tensor in tensors if not overlaps(tensor)]
    if separate:
        _multiply_(separate, multipliers)
    for tensor in tensors:
        if overlaps(tensor):
            with exclusive(tensor) as memory:
                _multiply_([memory], multipliers)


def _multiply_(tensors: list[Tensor], multipliers: list[Tensor]) -> None:
    for multiplier in multipliers:
        if multiplier == 0:
            torch._foreach_zero_(tensors)
        else:
            torch._foreach_mul_(tensors, multiplier)


def _host_clamp_(tensors: Sequence[Tensor], bounds: Sequence[float]) -> None:
    largest = _host_power_sums(tensors, INFINITY).tolist()
    for tensor, bound, most in zip(tensors, bounds, largest, strict=True):
        if most > bound:
            with exclusive(tensor) as memory:
                memory.clamp_(-bound, bound)


# Off the CPU: nothing that reads a value on the host


def _device_power_sums(tensors: Sequence[Tensor], order: float) -> Tensor:
    dtype = norm_dtype(tensors[0].device)
    filled = [tensor for tensor in tensors if tensor.numel()]
    norms = iter(torch._foreach_norm(filled, order, dtype=dtype) if filled else ())
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    stacked = torch.stack([next(norms) if tensor.numel() else zero for tensor in tensors])
    return stacked if order == INFINITY else stacked.pow_(order)


def _device_scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    each = coefficients.expand(len(tensors)).unsqueeze(-1)
    for tensor, coefficient in zip(tensors, each.unbind(), strict=True):
        with exclusive(tensor) as memory:
            # One dimension, so that the product is computed in the coefficient's own dtype.
            memory = memory.view(1) if memory.dim() == 0 else memory
            memory.mul_(coefficient).masked_fill_(coefficient == 0, 0)
