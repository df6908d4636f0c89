"""The engine of torch operators on the CPU: one read, and writes only to tensors that change.

Sums start in float32, at memory speed, and continue in float64: 128 elements become their norm.
The sum of so few powers keeps 1e-6 on constant data too, where the rounding errors of longer sums
add up instead of cancelling. A sum out of the range of float32 (an overflow, or so small that
squares may have vanished) is computed again in float64 from the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ..base import INFINITY, INTEGERS, root, rounded_bounds
from ..layout import (
    as_stored,
    blocks,
    flat,
    is_plain,
    overlaps,
    rows_at_once,
    stored_once,
    table,
    writable,
)

QUICK = (1, 2, INFINITY)
"""Orders whose sums may start in float32: the powers of others leave its range too easily."""
PIECE = 128
"""Elements summed in float32. With twice as many, one element that is a thousand times as large as
the others would cost more than 1e-6: what is added to it is rounded alike every time."""
SMALL = 8192
"""Tensors up to this length are converted to float64 at once: that costs less than pieces."""
VANISHING = 2.0**-70
"""A smaller sum may have lost much in float32, where squares below 2**-126 vanish."""
SMALLEST_NORMAL = 2.0**-126

_Change = Callable[[list[Tensor], list[Tensor]], object]
"""Changes each tensor in place by its number, or by one number for each of its rows."""


def norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all tensors together, shape (1,)."""
    if order in QUICK:
        small, large = _by_size(tensors)
        pieces = [norms for tensor in large for norms in _piece_norms(_as_row(tensor), order)]
        # Small gradients and pieces apart: torch.cat is slow where it promotes half precision.
        norms = [_norm(_joined(values), order) for values in (small, pieces) if values]
        norm = norms[0] if len(norms) == 1 else _norm(torch.cat(norms), order)
        value = norm.item()
        power_sum = value * value if order == 2 else value
        out_of_range = power_sum < VANISHING or power_sum == INFINITY
        if tensors[0].dtype is torch.float64 or not out_of_range:
            return norm
    sums = power_sums(tensors, order, rows=False)
    if order == INFINITY:
        return sums.amax(0, keepdim=True)
    return root(sums.sum(0, keepdim=True), order)


def power_sums(tensors: Sequence[Tensor], order: float, *, rows: bool) -> Tensor:
    """Return the power sums of all tensors, or of all their rows."""
    small, large = _by_size(tensors)
    if not large:
        return _small_sums(small, order, rows)
    small_sums = iter(_small_sums(small, order, rows).split(_counts(small, rows)) if small else ())
    return torch.cat(
        [
            next(small_sums) if tensor.numel() <= SMALL else _large_sums(tensor, order, rows)
            for tensor in tensors
        ]
    )


def _by_size(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    small = [tensor for tensor in tensors if tensor.numel() <= SMALL]
    return small, [t for t in tensors if t.numel() > SMALL] if len(small) < len(tensors) else []


def _small_sums(tensors: Sequence[Tensor], order: float, rows: bool) -> Tensor:
    """Return the sums of tensors, or of their rows, in float64 from the first element on."""
    if rows:
        counts = [*map(len, tensors)]
        columns = [tensor.numel() // max(len(tensor), 1) for tensor in tensors]
        both = torch.tensor([columns, counts], dtype=torch.int64, device="cpu")
        lengths = both[0].repeat_interleave(both[1], output_size=sum(counts))
    else:
        sizes = [*map(Tensor.numel, tensors)]
        lengths = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    values = as_stored(_flatten_dense_tensors(tensors))
    sums = _segment_sums(values.double(), lengths, order)
    # A low power of a denormal counts even beside large elements.
    if (order not in QUICK or bool((sums < VANISHING).any())) and flushes_denormals():
        return _segment_sums(widened(values), lengths, order)
    return sums


def _segment_sums(values: Tensor, lengths: Tensor, order: float) -> Tensor:
    reduction = "max" if order == INFINITY else "sum"
    powers = _powers(values, order)
    return torch.segment_reduce(powers, reduction, lengths=lengths, initial=0, unsafe=True)


def _large_sums(tensor: Tensor, order: float, rows: bool) -> Tensor:
    """Return the sum of a tensor, or of its rows; in float64 where float32 left its range."""
    matrix = table(as_stored(tensor)) if rows else _as_row(tensor)
    if order not in QUICK or tensor.dtype is torch.float64:
        return _row_sums(matrix, order, exact=True)
    sums = _row_sums(matrix, order, exact=False)
    doubtful = (sums < VANISHING) | (sums == INFINITY)
    if bool(doubtful.any()):
        # Rows of zeros are common, and their sum is right. Bytes, since denormals may be flushed.
        filled = matrix.view(torch.uint8).amax(1) > 0
        (index,) = torch.where(doubtful & filled)
        for some in index.split(rows_at_once(matrix.shape[1])) if len(index) else ():
            chosen = matrix if len(matrix) == 1 else matrix[some]
            sums[some] = _row_sums(chosen, order, exact=True)
    return sums


def _row_sums(matrix: Tensor, order: float, *, exact: bool) -> Tensor:
    norms = _joined([*_piece_norms(matrix, order, exact=exact)]).view(len(matrix), -1)
    return norms.abs().amax(1) if order == INFINITY else _powers(norms, order).sum(1)


def _piece_norms(matrix: Tensor, order: float, *, exact: bool = False) -> Iterator[Tensor]:
    """Yield the norms of the pieces of each row, row by row; ``exact`` in float64 throughout."""
    dtype = torch.float64 if exact or matrix.dtype is torch.float64 else torch.float32
    if order == INFINITY and not exact and len(matrix) == 1:
        yield torch.stack(torch.aminmax(matrix))  # one read and no copy
    elif matrix.dtype is dtype and order == 2:
        yield piece_norms(matrix, order)
    elif exact and matrix.dtype is not dtype and flushes_denormals():
        yield from (piece_norms(widened(block), order) for block in blocks(matrix))
    else:
        # One buffer for all blocks: fresh memory for each would cost as much as the sums.
        buffer = torch.empty(0, dtype=dtype, device="cpu")
        for block in blocks(matrix):
            if block.dtype is not dtype:
                buffer.resize_(max(buffer.numel(), block.numel()))
                block = buffer[: block.numel()].view(block.shape).copy_(block)
            yield piece_norms(block, order)


def piece_norms(matrix: Tensor, order: float) -> Tensor:
    """Return the norms of pieces of up to 128 elements, shape (rows, pieces of a row)."""
    columns = matrix.shape[1]
    rest = columns % PIECE
    if columns < PIECE or not rest:
        return _last_norms(matrix.unflatten(1, (-1, min(PIECE, columns))), order)
    whole = _last_norms(matrix[:, :-rest].unflatten(1, (-1, PIECE)), order)
    return torch.cat([whole, _last_norms(matrix[:, -rest:].unsqueeze(1), order)], 1)


def _last_norms(pieces: Tensor, order: float) -> Tensor:
    if order == 1:
        # vector_norm adds one element after the other, sum in parallel lanes.
        return pieces.abs().sum(-1)
    if order == INFINITY:
        return pieces.abs().amax(-1)
    norms: Tensor = torch.linalg.vector_norm(pieces, order, -1)
    return norms


def _norm(values: Tensor, order: float) -> Tensor:
    if order == INFINITY:
        return values.abs().amax(0, keepdim=True) if values.numel() else values.new_zeros(1)
    norm: Tensor = torch.linalg.vector_norm(values, order, 0, keepdim=True)
    return norm


def _powers(values: Tensor, order: float) -> Tensor:
    if order == 2:
        return values.square()
    return values.abs() if order in (1, INFINITY) else values.abs().pow_(order)


def _as_row(tensor: Tensor) -> Tensor:
    return flat(as_stored(tensor)).unsqueeze(0)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    joined: Tensor = _flatten_dense_tensors(tensors)
    return joined.double()


def _counts(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    """Return how many sums, or numbers, each tensor has."""
    return [len(tensor) for tensor in tensors] if rows else [1] * len(tensors)


def flushes_denormals() -> bool:
    """Return whether arithmetic on the CPU treats denormals as 0 (torch.set_flush_denormal)."""
    smallest = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
    return float(smallest.double()) == 0


def widened(values: Tensor) -> Tensor:
    """Return the magnitudes in float64, with denormals read from their bits."""
    info, integers = torch.finfo(values.dtype), INTEGERS[values.element_size()]
    bits = values.view(integers) & torch.iinfo(integers).max
    # With exponent bits of zero a float is its mantissa times the smallest denormal.
    denormal = bits.double() * (info.smallest_normal * info.eps)
    return torch.where(bits < 1 / info.eps, denormal, values.double().abs())


def scale_(tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool) -> None:
    """Multiply tensors, or their rows, where the coefficient does not round to 1."""
    wide = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    if coefficients.numel() == 1 and all(map(is_plain, tensors)):
        coefficient = coefficients.item()
        if coefficient >= SMALLEST_NORMAL:
            # A 0-d tensor: torch rounds a Python number to the gradients' float16.
            factor = torch.scalar_tensor(coefficient, dtype=wide, device="cpu")
            if factor.item() != 1:
                # Backwards: what was measured last may still be in cache.
                torch._foreach_mul_([*reversed(tensors)], factor)
            return
    factors = coefficients
    if not bool((factors >= SMALLEST_NORMAL).all()):
        _change_where_(factors == 0, tensors, factors, _erase_, rows)
        factors = factors.masked_fill(factors == 0, 1)
        # Denormal factors are less exact in float32, and 0 where denormals are flushed: multiply
        # by normal ones, one after the other.
        while wide is torch.float32 and bool((tiny := factors < SMALLEST_NORMAL).any()):
            step = torch.ones_like(factors).masked_fill_(tiny, 2.0**-64)
            _change_where_(tiny, tensors, step.float(), torch._foreach_mul_, rows)
            factors = factors / step
    factors = factors.to(wide)
    _change_where_(factors != 1, tensors, factors, torch._foreach_mul_, rows)


def clamp_(tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool) -> None:
    """Limit the elements of tensors, or of their rows, where the largest one does not fit."""
    rounded = rounded_bounds(bounds, tensors[0].dtype)
    largest = power_sums(tensors, INFINITY, rows=rows)
    if bool((largest.isnan() & (rounded < INFINITY)).any()):
        # NaN counts as the largest, and hides whether the others fit.
        numbers = [tensor.nan_to_num(0, INFINITY, -INFINITY) for tensor in tensors]
        largest = power_sums(numbers, INFINITY, rows=rows)
    _change_where_(largest > rounded, tensors, rounded.to(tensors[0].dtype), _limit_, rows)


def _erase_(memories: list[Tensor], _: list[Tensor]) -> None:
    torch._foreach_zero_(memories)


def _limit_(memories: list[Tensor], bounds: list[Tensor]) -> None:
    for memory, bound in zip(memories, bounds, strict=True):
        memory.clamp_(-bound, bound)


def _change_where_(
    chosen: Tensor, tensors: Sequence[Tensor], numbers: Tensor, change_: _Change, rows: bool
) -> None:
    """Change the chosen tensors, or rows, each by its number; one flag or number serves all."""
    if not bool(chosen.any()):
        return
    counts = _counts(tensors, rows)
    chosen, numbers = chosen.expand(sum(counts)), numbers.expand(sum(counts))
    if rows:
        by_tensor = zip(tensors, chosen.split(counts), numbers.split(counts), strict=True)
        for tensor, flags, row_numbers in by_tensor:
            if bool(flags.any()):
                _change_rows_(stored_once(tensor), flags, row_numbers, change_)
        return
    memories: list[Tensor] = []
    factors: list[Tensor] = []
    for tensor, is_chosen, number in zip(tensors, chosen.tolist(), numbers.unbind(), strict=True):
        if is_chosen and is_plain(tensor):
            memories.append(tensor)
            factors.append(number)
        elif is_chosen:
            with writable(tensor) as memory:
                change_([memory], [number])
    if memories:
        change_(memories[::-1], factors[::-1])  # backwards, as above


def _change_rows_(memory: Tensor, chosen: Tensor, numbers: Tensor, change_: _Change) -> None:
    if overlaps(memory):  # windows inside a row, which no training makes
        _change_where_(chosen, memory.unbind(), numbers, change_, rows=False)
        return
    at_once = rows_at_once(memory[:1].numel())
    numbers = numbers.view(-1, *[1] * (memory.dim() - 1))
    if bool(chosen.all()):
        change_([*memory.split(at_once)], [*numbers.split(at_once)])
        return
    for index in torch.where(chosen)[0].split(at_once):
        rows = memory[index]
        change_([rows], [numbers[index]])
        memory.index_copy_(0, index, rows)
