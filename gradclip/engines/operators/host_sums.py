"""Power sums and norms on the CPU, where the host may look at values, with one read.

Large tensors are condensed first. A piece of at most 128 elements becomes its norm, in the
gradient's own vector code at memory speed; a sum of so few squares keeps 1e-6 on constant data
too, where the rounding of longer runs adds up. In half precision a piece of at most 192 elements
becomes its mean and its deviation. These are then summed in float64, as small tensors are from
their first element on. What comes out of range of float32 (too large, or so small that squares
vanish) is summed once more in float64.

A large tensor is a table here, and each of its rows has a sum: one row for each index of
dimension 0, or a single one with all elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from ..base import INFINITY, root
from ..bits import are_filled, flushes_denormals, magnitude_bits, widened
from ..layout import as_it_lies, blocks, flat, rows_at_once, table

HALVES = (torch.bfloat16, torch.float16)
QUICK = (1, 2, INFINITY)
"""Orders whose sums may begin in float32: the powers of others leave its range too easily."""
ROW = 128
"""Elements summed in float32 before float64 takes over: of twice as many, one that is a thousand
times as large as the others costs more than 1e-6."""
HALF_ROW = 192
"""The same of half precision, whose moments cost the more the shorter they are."""
NARROW = 96
"""Shorter pieces of half precision are converted: their moments would cost more."""
SMALL = 8192
"""Tensors up to this length are converted to float64 as they are: cheaper than condensing."""
VANISHING = 2.0**-70
"""A smaller sum may have lost much to float32, where what is below 2**-126 may vanish."""

_Sums = TypeVar("_Sums", float, Tensor)


class _Condensed(NamedTuple):
    """What stands for pieces: their norms, or means, deviations and width."""

    values: Tensor
    variances: Tensor | None = None
    width: int = 1


def norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of all tensors together, shape (1,)."""
    if order in QUICK:
        found = _quick_norm(tensors, order)
        value = found.item()
        if not _doubtful(value * value if order == 2 else value, tensors[0].dtype):
            return found
    sums = power_sums(tensors, order, rows=False)
    if order == INFINITY:
        return sums.amax(0, keepdim=True)
    return root(sums.sum(0, keepdim=True), order)


def power_sums(tensors: Sequence[Tensor], order: float, *, rows: bool) -> Tensor:
    """Return the power sums of all tensors, or of all their rows."""
    small, large = _by_size(tensors)
    if not large:
        return _small_sums(small, order, rows)
    if not small:
        return _large_sums(large, order, rows)
    of_small = iter(_small_sums(small, order, rows).split(_counts(small, rows)))
    of_large = iter(_large_sums(large, order, rows).split(_counts(large, rows)))
    return torch.cat([next(of_small if t.numel() <= SMALL else of_large) for t in tensors])


def _quick_norm(tensors: Sequence[Tensor], order: float) -> Tensor:
    small, large = _by_size(tensors)
    parts = [*chain(*[_condensed(_single_row(tensor), order, False) for tensor in large])]
    if not parts or parts[0].values.dtype is tensors[0].dtype:
        return _norm(_joined([*small, *(part.values for part in parts)]), order)
    # Apart, since to join several dtypes is slow.
    norms = [root(_powers_of(parts, order).sum(0, keepdim=True), order)]
    if small:
        norms.append(_norm(_joined(small), order))
    return _norm(torch.cat(norms), order)


def _norm(values: Tensor, order: float) -> Tensor:
    if order == INFINITY:
        return values.abs().amax(0, keepdim=True) if values.numel() else values.new_zeros(1)
    norm: Tensor = torch.linalg.vector_norm(values, order, 0, keepdim=True)
    return norm


def _by_size(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    small = [tensor for tensor in tensors if tensor.numel() <= SMALL]
    return small, [t for t in tensors if t.numel() > SMALL] if len(small) < len(tensors) else []


def _powers(values: Tensor, order: float) -> Tensor:
    if order == 2:
        return values.square()
    return values.abs() if order in (1, INFINITY) else values.abs().pow_(order)


def _segment_sums(powers: Tensor, lengths: Tensor, order: float) -> Tensor:
    """Return the power sum of each run of float64 powers."""
    if order == INFINITY:
        return torch.segment_reduce(powers, "max", lengths=lengths, initial=0, unsafe=True)
    return torch.segment_reduce(powers, "sum", lengths=lengths, unsafe=True)


def _doubtful(sums: _Sums, dtype: torch.dtype) -> _Sums:
    """Tell which sums that were begun in float32 may have left its range."""
    if dtype is torch.float64:
        return sums < 0
    doubtful = (sums < VANISHING) | (sums == INFINITY)
    # In half precision an infinite mean makes the variance NaN.
    return doubtful | (sums != sums) if dtype in HALVES else doubtful


def _small_sums(tensors: Sequence[Tensor], order: float, rows: bool) -> Tensor:
    counts = _counts(tensors, rows)
    columns = [t.numel() // max(count, 1) for t, count in zip(tensors, counts, strict=True)]
    lengths = _repeated(columns, counts)
    values = as_it_lies(_flatten_dense_tensors(tensors))
    sums = _segment_sums(_powers(values.double(), order), lengths, order)
    if (order not in QUICK or bool((sums < VANISHING).any())) and flushes_denormals():
        return _segment_sums(_powers(widened(values), order), lengths, order)
    return sums


def _large_sums(tensors: Sequence[Tensor], order: float, rows: bool) -> Tensor:
    tables = [table(as_it_lies(tensor)) if rows else _single_row(tensor) for tensor in tensors]
    sums = _row_sums(tables, order, exact=order not in QUICK)
    doubtful = _doubtful(sums, tensors[0].dtype)
    if order in QUICK and bool(doubtful.any()):
        counts = [len(table) for table in tables]
        for each in zip(tables, sums.split(counts), doubtful.split(counts), strict=True):
            _sum_again_(*each, order)
    return sums


def _sum_again_(table: Tensor, sums: Tensor, doubtful: Tensor, order: float) -> None:
    """Put in what float64 finds, but for rows of zeros: they are common, and their sum is right."""
    if not bool(doubtful.any()):
        return
    (index,) = torch.where(doubtful & are_filled(table))
    for some in index.split(rows_at_once(table.shape[1])) if len(index) else ():
        rows = table if len(table) == 1 else table[some]
        sums[some] = _row_sums([rows], order, exact=True)


def _row_sums(tables: Sequence[Tensor], order: float, *, exact: bool) -> Tensor:
    """Return the sums of all rows, ``exact`` with float64 from the first element on."""
    parts = [[*_condensed(table, order, exact)] for table in tables]
    counts = [len(table) for table in tables]
    sizes = [sum(part.values.numel() for part in own) for own in parts]
    lengths = _repeated([n // k for n, k in zip(sizes, counts, strict=True)], counts)
    return _segment_sums(_powers_of([*chain(*parts)], order), lengths, order)


def _powers_of(condensed: list[_Condensed], order: float) -> Tensor:
    powers = _powers(_joined([part.values for part in condensed]), order)
    variances = [part.variances for part in condensed if part.variances is not None]
    if variances:
        widths = _repeated([part.width for part in condensed], [*map(len, variances)])
        powers.add_(_flatten_dense_tensors(variances)).mul_(widths)
    return powers


def _condensed(table: Tensor, order: float, exact: bool) -> Iterator[_Condensed]:
    """Yield what stands for the pieces of each row, equally many of all, row after row."""
    wide = torch.float64 if exact or table.dtype is torch.float64 else torch.float32
    if order == INFINITY and not exact:
        yield _Condensed(_largest(table))
    elif table.dtype is wide and order != 1:
        yield _Condensed(piece_norms(table, order).flatten())
    elif order == 2 and not exact:
        yield from _moments(table)
    else:
        for block in _converted(table, wide):
            yield _Condensed(piece_norms(block, order).flatten())


def piece_norms(table: Tensor, order: float) -> Tensor:
    """Return the norms of all pieces of at most 128 elements, shape (rows, pieces of a row)."""
    rows, columns = table.shape
    count, rest = divmod(columns, width := _width(columns, ROW))
    body = table[:, :-rest] if rest else table
    norms = _last_norms(body.view(rows, count, width), order)
    if not rest:
        return norms
    return torch.cat([norms, _last_norms(table[:, -rest:].unsqueeze(1), order)], 1)


def _last_norms(pieces: Tensor, order: float) -> Tensor:
    if order == 1:
        # vector_norm adds up one by one, sum in parallel lanes.
        return pieces.abs().sum(-1)
    norms: Tensor = torch.linalg.vector_norm(pieces, order, -1)
    return norms


def _moments(table: Tensor) -> Iterator[_Condensed]:
    """Yield means and variances, whose squares and which add up to the mean of squares.

    The statistics of batch normalisation read half precision and add up in float32.
    """
    columns = table.shape[1]
    width = _width(columns, HALF_ROW)
    if width < NARROW or columns % width:
        for block in _converted(table, torch.float32):
            norms = piece_norms(block, 2.0).flatten()
            yield _Condensed(norms, torch.zeros_like(norms))
        return
    pieces = table.reshape(1, -1, width)
    running = torch.zeros(pieces.shape[1], dtype=torch.float32, device="cpu")  # for its dtype alone
    yield _Condensed(*torch.batch_norm_update_stats(pieces, running, running, 0.0), width)


def _largest(table: Tensor) -> Tensor:
    if len(table) == 1:
        return torch.stack(torch.aminmax(table))
    return torch.cat([magnitude_bits(block).amax(1) for block in blocks(table)]).view(table.dtype)


def _converted(table: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield consecutive blocks in another dtype, all in one buffer."""
    narrow = table.dtype in (torch.float32, torch.bfloat16)
    hidden = dtype is torch.float64 and narrow and flushes_denormals()
    buffer: Tensor | None = None
    for block in blocks(table):
        if buffer is None:
            buffer = torch.empty(block.numel(), dtype=dtype, device="cpu")
        part = buffer[: block.numel()].view(block.shape)
        yield part.copy_(widened(block) if hidden else block)


def _width(columns: int, longest: int) -> int:
    """Return how long the pieces of a row are: long, and such that nothing is left over."""
    if columns <= longest:
        return columns
    even = (width for width in range(longest, longest // 2 - 1, -1) if columns % width == 0)
    return next(even, longest)


def _single_row(tensor: Tensor) -> Tensor:
    return flat(as_it_lies(tensor)).unsqueeze(0)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    joined: Tensor = _flatten_dense_tensors(tensors)
    return joined.double()


def _counts(tensors: Sequence[Tensor], rows: bool) -> list[int]:
    """Return how many sums each tensor has."""
    return [len(tensor) for tensor in tensors] if rows else [1] * len(tensors)


def _repeated(values: Iterable[int], counts: Iterable[int]) -> Tensor:
    """Return integers, each as often as its count says. Not to be written."""
    # The compiler traces through a cache, and warns of it.
    make = _repeated_anew if torch.compiler.is_compiling() else _repeated_once
    return make(tuple(values), tuple(counts))


def _repeated_anew(values: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    integers = torch.tensor(values, dtype=torch.int64, device="cpu")
    return integers.repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))


_repeated_once = lru_cache(maxsize=16)(_repeated_anew)
