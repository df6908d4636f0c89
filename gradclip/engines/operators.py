"""The engine of torch operators: the CPU, and any device without an engine of its own.

Two ways, because the host may look at a CPU tensor for free and must never look at another:

On the CPU large tensors are condensed first. A row of 256 elements becomes its norm, in the
gradient's own vector code at memory speed; a sum of so few squares keeps 1e-6 on constant
data too, where the rounding of longer runs adds up. In half precision it becomes its mean and
its deviation. Beside small tensors as they are, these are then summed in float64. What comes out
of range of float32 (too large, or so small that squares vanish) is summed once more, all of it
in float64.

Elsewhere the sums are torch's multi-tensor norms with float64 accumulation, and nothing here
waits for the device.

Only operators that obey neither the matmul precision nor a default device, and none under
autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .base import INFINITY, Engine, norm_dtype, rounded_bound, rounds_to_one
from .memory import exclusive, flat, is_plain

HALVES = (torch.bfloat16, torch.float16)
QUICK = (1, 2, INFINITY)
"""Orders whose sums may begin in float32: the powers of others leave its range too easily."""
ROW = 256
"""Elements summed in float32 before float64 takes over."""
SMALL = 8192
"""Tensors up to this length are converted to float64 as they are: cheaper than condensing."""
CHUNK = 1 << 18
"""Elements converted at a time (whole rows): few enough to stay in cache."""
VANISHING = 2.0**-70
"""A smaller sum may have lost much to float32, where what is below 2**-126 may vanish."""
SMALLEST_NORMAL = 2.0**-126


class OperatorsEngine(Engine):
    """Measures with one read and writes only what changes, in torch operators alone."""

    name = "operators"

    def power_sums(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """See `Engine.power_sums`."""
        if not tensors[0].is_cpu:
            return _device_power_sums(tensors, order)
        return _without_autocast(_host_power_sums, tensors, order)

    def norm(self, tensors: Sequence[Tensor], order: float) -> Tensor:
        """See `Engine.norm`."""
        if not tensors[0].is_cpu:
            return _device_norm(tensors, order)
        return _without_autocast(_host_norm, tensors, order)

    def scale_(self, tensors: Sequence[Tensor], coefficients: Tensor) -> None:
        """See `Engine.scale_`. Off the CPU it multiplies always, since looking would wait."""
        if tensors[0].is_cpu:
            _host_scale_(tensors, coefficients)
        else:
            _device_scale_(tensors, coefficients)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor) -> None:
        """See `Engine.clamp_`. Off the CPU it writes always, since looking would wait."""
        if tensors[0].is_cpu:
            _host_clamp_(tensors, bounds, self.power_sums(tensors, INFINITY))
        else:
            _device_clamp_(tensors, bounds)


# On the CPU: measuring


def _without_autocast(
    measure: Callable[[Sequence[Tensor], float], Tensor], tensors: Sequence[Tensor], order: float
) -> Tensor:
    if not torch.is_autocast_enabled("cpu"):
        return measure(tensors, order)
    # It would choose the dtype in which tensors are concatenated, or refuse to.
    with torch.autocast("cpu", enabled=False):
        return measure(tensors, order)


def _host_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    if order in QUICK:
        norm = _quick_norm(tensors, order)
        if not _doubtful(norm.item() ** min(order, 2), tensors[0].dtype):
            return norm
    return _norm(_joined(_condensed(tensors, order, exact=True)), order)


def _quick_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    if max(map(Tensor.numel, tensors)) <= SMALL:
        # The usual case of a small model, in which every call counts.
        return _norm(_flatten_dense_tensors(tensors).double(), order)
    if order == 2 and tensors[0].dtype in HALVES:
        small = [tensor for tensor in tensors if tensor.numel() <= SMALL]
        large = [tensor for tensor in tensors if tensor.numel() > SMALL]
        return _norm_of_all([small, _row_moments(large)], order)
    return _norm_of_all(_condensed(tensors, order, exact=False), order)


def _host_power_sums(tensors: Sequence[Tensor], order: float) -> Tensor:
    if order not in QUICK:
        return _sums(tensors, order, exact=True)
    sums = _sums(tensors, order, exact=False)
    for index, total in enumerate(sums.tolist()):
        if _doubtful(total, tensors[0].dtype):
            sums[index : index + 1] = _sums(tensors[index : index + 1], order, exact=True)
    return sums


def _doubtful(power_sum: float, dtype: torch.dtype) -> bool:
    """Tell whether a sum that was begun in float32 may have left its range."""
    if dtype in HALVES:
        return not VANISHING <= power_sum < INFINITY  # an infinite mean makes the variance NaN
    return (power_sum < VANISHING or power_sum == INFINITY) and dtype is not torch.float64


def _sums(tensors: Sequence[Tensor], order: float, exact: bool) -> Tensor:
    """Return the power sums, ``exact`` where float64 takes part from the first element on."""
    condensed = list(_condensed(tensors, order, exact=exact))
    values = _joined(condensed).abs()
    lengths = [sum(map(Tensor.numel, pieces)) for pieces in condensed]
    segments = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    if order == INFINITY:
        return torch.segment_reduce(values, "max", lengths=segments, initial=0, unsafe=True)
    return torch.segment_reduce(values.pow_(order), "sum", lengths=segments, unsafe=True)


def _joined(condensed: Iterable[list[Tensor]]) -> Tensor:
    joined: Tensor = _flatten_dense_tensors([*chain.from_iterable(condensed)])
    return joined.double()


def _norm_of_all(condensed: Iterable[list[Tensor]], order: float) -> Tensor:
    # Apart by dtype: to join several is slow.
    alike: dict[torch.dtype, list[Tensor]] = {}
    for piece in chain.from_iterable(condensed):
        alike.setdefault(piece.dtype, []).append(piece)
    norms = [_norm(_joined([pieces]), order) for pieces in alike.values()]
    return norms[0] if len(norms) == 1 else _norm(torch.cat(norms), order)


def _norm(values: Tensor, order: float) -> Tensor:
    if order == INFINITY:
        return values.abs().amax(0, keepdim=True) if values.numel() else values.new_zeros(1)
    norm: Tensor = torch.linalg.vector_norm(values, order, 0, keepdim=True)
    return norm


def _condensed(tensors: Sequence[Tensor], order: float, *, exact: bool) -> Iterator[list[Tensor]]:
    """Yield for each tensor short ones with the same power sum, at the price of one read."""
    longest = 0 if exact else SMALL
    given = tensors[0].dtype
    needed = torch.float64 if exact or given is torch.float64 else torch.float32
    as_it_is = (given is needed and order != 1) or (order == INFINITY and not exact)
    buffer: Tensor | None = None
    for tensor in tensors:
        if tensor.numel() <= longest:
            yield [tensor]
        elif as_it_is:
            yield _row_norms(flat(tensor), order)
        elif order == 2 and not exact:  # half precision
            yield _row_moments([tensor])
        else:
            if buffer is None:
                buffer = torch.empty(CHUNK, dtype=needed, device="cpu")
            yield _converted_row_norms(flat(tensor), order, buffer)


def _converted_row_norms(values: Tensor, order: float, buffer: Tensor) -> list[Tensor]:
    wide = buffer.dtype is torch.float64
    hidden = wide and values.dtype in _DENORMALS and _flushes_denormals()
    pieces: list[Tensor] = []
    for chunk in values.split(CHUNK):
        part = buffer if chunk.numel() == CHUNK else buffer[: chunk.numel()]
        part.copy_(_with_denormals(chunk) if hidden else chunk)
        norms, *rest = _row_norms(part, order)
        # The next tensor goes through the same buffer.
        pieces += [norms, *(tensor.clone() for tensor in rest)]
    return pieces


def _row_norms(values: Tensor, order: float) -> list[Tensor]:
    """Return the norms of all whole rows, then what is left over."""
    if order == INFINITY:
        return [*torch.aminmax(values)]
    count, rest = divmod(values.numel(), ROW)
    body = values[:-rest] if rest else values
    rows = body.view(count, ROW)
    # For the 1-norm vector_norm adds up one by one, sum in parallel lanes.
    norms = rows.abs().sum(1) if order == 1 else torch.linalg.vector_norm(rows, order, 1)
    return [norms, values[-rest:]] if rest else [norms]


def _row_moments(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return mean and deviation of all whole rows, with their power sum, then what is left over.

    The statistics of batch normalisation read half precision and add up in float32.
    """
    means, variances, left_over = [], [], []
    for values in map(flat, tensors):
        count, rest = divmod(values.numel(), ROW)
        if count:
            rows = (values[:-rest] if rest else values).view(1, count, ROW)
            running = torch.zeros(count, dtype=torch.float32, device="cpu")  # for its dtype alone
            mean, variance = torch.batch_norm_update_stats(rows, running, running, 0.0)
            means.append(mean)
            variances.append(variance)
        if rest:
            left_over.append(values[-rest:])
    if not means:
        return left_over
    deviations = torch.cat(variances).mul_(ROW).sqrt_()
    return [torch.cat(means).mul_(ROW**0.5), deviations, *left_over]


# What a float is when its exponent bits are zero: its mantissa times the smallest subnormal.
_DENORMALS = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 1 << 23, 2.0**-149),
    torch.bfloat16: (torch.int16, 0x7FFF, 1 << 7, 2.0**-133),
}


def _flushes_denormals() -> bool:
    smallest = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
    return float(smallest.double()) == 0


def _with_denormals(values: Tensor) -> Tensor:
    """Return the magnitudes in float64, read from the bits where arithmetic would see 0."""
    integers, mask, first_normal, smallest = _DENORMALS[values.dtype]
    bits = values.view(integers) & mask
    return torch.where(bits < first_normal, bits.double() * smallest, values.double().abs())


# On the CPU: writing


def _host_scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    if coefficients.numel() == 1:
        _scale_all_(tensors, coefficients.item())
        return
    for tensor, coefficient in zip(tensors, coefficients.tolist(), strict=True):
        _scale_all_([tensor], coefficient)


def _scale_all_(tensors: Sequence[Tensor], coefficient: float) -> None:
    if rounds_to_one(coefficient, tensors[0].dtype):
        return
    factors = _factors(coefficient, tensors[0].dtype)
    separate: list[Tensor] = []
    # Backwards, since the last ones were measured last and may still be in cache.
    for tensor in reversed(tensors):
        if is_plain(tensor):
            separate.append(tensor)
            continue
        with exclusive(tensor) as memory:
            _multiply_([memory], factors)
    if separate:
        _multiply_(separate, factors)


def _factors(coefficient: float, dtype: torch.dtype) -> list[Tensor]:
    """Return what to multiply with, one after the other; nothing for zero."""
    wide = dtype is torch.float64
    factors: list[float] = []
    while 0 < coefficient < SMALLEST_NORMAL and not wide:
        # Not a normal float32 number: less exact, and 0 where denormals are flushed.
        factors.append(2.0**-64)
        coefficient *= 2.0**64
    if coefficient > 0:
        factors.append(coefficient)
    # A 0-d tensor is not rounded to the gradients' dtype, as a Python number is for float16.
    dtype = torch.float64 if wide else torch.float32
    return [torch.scalar_tensor(factor, dtype=dtype, device="cpu") for factor in factors]


def _multiply_(tensors: list[Tensor], factors: list[Tensor]) -> None:
    if not factors:
        torch._foreach_zero_(tensors)
    for factor in factors:
        torch._foreach_mul_(tensors, factor)


def _host_clamp_(tensors: Sequence[Tensor], bounds: Tensor, largest: Tensor) -> None:
    each = bounds.expand(len(tensors)).tolist()
    for tensor, bound, most in zip(tensors, each, largest.tolist(), strict=True):
        limit = rounded_bound(bound, tensor.dtype)
        # Beside a NaN, which counts as the largest, others may still be too large.
        if most > limit or (math.isnan(most) and bool((tensor.abs() > limit).any())):
            with exclusive(tensor) as memory:
                memory.clamp_(-limit, limit)


# Off the CPU: nothing that reads a value on the host


def _device_power_sums(tensors: Sequence[Tensor], order: float) -> Tensor:
    norms = _device_norms(tensors, order)
    return norms if order == INFINITY else norms.pow_(order)


def _device_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(_device_norms(tensors, order), order, 0, keepdim=True)
    return norm


def _device_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    dtype = norm_dtype(tensors[0].device)
    filled = [tensor for tensor in tensors if tensor.numel()]
    norms = iter(torch._foreach_norm(filled, order, dtype=dtype) if filled else ())
    zero = torch.zeros((), dtype=dtype, device=tensors[0].device)
    return torch.stack([next(norms) if tensor.numel() else zero for tensor in tensors])


def _device_scale_(tensors: Sequence[Tensor], coefficients: Tensor) -> None:
    each = coefficients.expand(len(tensors)).unsqueeze(-1)
    for tensor, coefficient in zip(tensors, each.unbind(), strict=True):
        with exclusive(tensor) as memory:
            # One dimension, so that the product is computed in the coefficient's own dtype.
            memory = memory.view(1) if memory.dim() == 0 else memory
            memory.mul_(coefficient).masked_fill_(coefficient == 0, 0)


def _device_clamp_(tensors: Sequence[Tensor], bounds: Tensor) -> None:
    largest = torch.finfo(tensors[0].dtype).max
    limits = torch.where(bounds < INFINITY, bounds.clamp(max=largest), bounds)
    for tensor, limit in zip(tensors, limits.expand(len(tensors)).unbind(), strict=True):
        with exclusive(tensor) as memory:
            memory.clamp_(-limit, limit)
