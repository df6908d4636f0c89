"""The Triton kernels: they measure, scale, clamp, clip rows, and write tables of addresses.

Three int64 tables describe the work. ``addresses`` has one address for each tensor. ``pieces`` has
four numbers for each piece: the index of its tensor, its first element, its length, and the index
of its strip. A strip is a tensor or a row, which has a sum, coefficient or bound of its own.
``starts`` has the first piece of each program, and the end of the last. See
`gradclip.engines.triton.plan`.

State is float64 throughout: partial sums, results, coefficients and bounds. Elements of float16,
bfloat16 and float32 are squared and summed in float32 first, at most 16 for each lane; a piece
whose sum leaves the range of float32 is read again in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOW = tl.constexpr(2.0**-80)
"""A piece with a smaller sum of squares may have lost some to underflow."""
HIGH = tl.constexpr(2.0**126)
"""A piece with a larger power sum may have overflowed."""
SMALL = tl.constexpr(2.0**-100)
"""Smaller coefficients are not rounded to float32, which has few bits for them, or none."""
LARGEST = tl.constexpr(float("inf"))
FIELDS = tl.constexpr(4)
COMBINED = tl.constexpr(1024)
"""Partial sums to add at a time."""


# State float64, of narrower elements float32 within a piece. Reads 8, 4 or 2 bytes per element,
# once (twice where a piece left the range of float32).
@triton.jit
def power_sums(
    addresses,
    pieces,
    starts,
    sums,
    totals,
    arrived,
    norm,
    ORDER: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Write the power sum of each piece to ``sums`` if EACH, and the norm of all if TOTAL."""
    program = tl.program_id(0)
    total = tl.full((), 0.0, tl.float64)
    for piece in range(tl.load(starts + program), tl.load(starts + program + 1)):
        address, length, _ = _piece(addresses, pieces, piece, ELEMENT)
        part = _power_sum(address, length, ORDER, ELEMENT, BLOCK)
        if EACH:
            tl.store(sums + piece, part)
        if TOTAL:
            total = _combined(total, part, ORDER)
    if TOTAL:
        tl.store(totals + program, total)
        # The last program to arrive adds the sums of all, always in the same order, so that the
        # bits do not depend on which one it is. The barrier puts the store before the counter.
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            total = _combined_all(totals, 0, tl.num_programs(0), ORDER)
            tl.store(norm, _root(total, ORDER))
            tl.store(arrived, 0)  # for the next launch: no other kernel has to reset it


# State float64. Reads 8 bytes per piece, none per element.
@triton.jit
def strip_sums(sums, first_pieces, results, ORDER: tl.constexpr):
    """Write the power sum of each strip to ``results``, from those of its pieces."""
    strip = tl.program_id(0)
    first, end = tl.load(first_pieces + strip), tl.load(first_pieces + strip + 1)
    tl.store(results + strip, _combined_all(sums, first, end, ORDER))


# State float64. Scaling reads and writes 8, 4 or 2 bytes per element, but none where the
# coefficient rounds to 1; clamping reads as many, but none where the bound is infinite, and writes
# only the blocks with an element that exceeds it.
@triton.jit(do_not_specialize=["programs", "grouped"])
def change(
    addresses,
    pieces,
    starts,
    numbers,
    programs,
    grouped,
    LIMIT: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Multiply every piece by the number of its strip, or by the one that all share.

    With LIMIT, clamp its elements to that number instead. Each program has the work of ``grouped``
    programs of the plan. The last piece comes first: it was measured last and is still in cache.
    """
    number = tl.load(numbers)
    if SHARED:
        # Read on the device: the host never learns whether anything was clipped.
        if _is_neutral(number, LIMIT, ELEMENT):
            return
    program = (tl.num_programs(0) - 1 - tl.program_id(0)) * grouped
    end = tl.load(starts + tl.minimum(program + grouped, programs))
    for back in range(end - tl.load(starts + program)):
        address, length, strip = _piece(addresses, pieces, end - 1 - back, ELEMENT)
        if not SHARED:
            number = tl.load(numbers + strip)
        if not _is_neutral(number, LIMIT, ELEMENT):
            _change_piece(address, length, number, LIMIT, ELEMENT, BLOCK)


# State as that of `power_sums`. Reads 8, 4 or 2 bytes per element of the gradients and as many of
# the weights; where the coefficient is below 1, reads the gradients again, which are in cache, and
# writes them.
@triton.jit(do_not_specialize=["rows"])
def clip_rows(
    addresses,
    weight_addresses,
    pieces,
    starts,
    results,
    rows,
    FACTOR: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    CAP: tl.constexpr,
    ERASE: tl.constexpr,
    WRITE: tl.constexpr,
    ORDER: tl.constexpr,
    ELEMENT: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write norm, limit and coefficient of every row to ``results``, and scale it if WRITE.

    Every strip is one piece. The limit is FACTOR max(norm of the weights, EPS), from FLOOR to CAP.
    """
    program = tl.program_id(0)
    for piece in range(tl.load(starts + program), tl.load(starts + program + 1)):
        address, length, row = _piece(addresses, pieces, piece, ELEMENT)
        weight_address, _, _ = _piece(weight_addresses, pieces, piece, WEIGHT)
        norm = _root(_power_sum(address, length, ORDER, ELEMENT, BLOCK), ORDER)
        weight_norm = _root(_power_sum(weight_address, length, ORDER, WEIGHT, BLOCK), ORDER)
        limit = _limit(weight_norm, FACTOR, EPS, FLOOR, CAP)
        coefficient = tl.where(norm > limit, limit / norm, 1.0)
        coefficient = tl.where(norm < LARGEST, coefficient, 0.0 if ERASE else 1.0)
        tl.store(results + row, norm)
        tl.store(results + rows + row, limit)
        tl.store(results + 2 * rows + row, coefficient)
        if WRITE:
            if not _is_neutral(coefficient, False, ELEMENT):
                _change_piece(address, length, coefficient, False, ELEMENT, BLOCK)


# No state. Writes 8 bytes per address, none per element. For captured graphs: a graph stores the
# arguments of a kernel, while host memory to copy from might be gone when it is replayed.
@triton.jit(do_not_specialize=["first", "a", "b", "c", "d", "e", "f", "g", "h"])
def write_addresses(addresses, first, a, b, c, d, e, f, g, h):
    """Write eight addresses into the table."""
    to = addresses + first
    tl.store(to, a)
    tl.store(to + 1, b)
    tl.store(to + 2, c)
    tl.store(to + 3, d)
    tl.store(to + 4, e)
    tl.store(to + 5, f)
    tl.store(to + 6, g)
    tl.store(to + 7, h)


# Functions of the kernels


@triton.jit
def _piece(addresses, pieces, piece, ELEMENT: tl.constexpr):
    """Return the address of a piece, its length and its strip."""
    fields = pieces + piece * FIELDS
    size: tl.constexpr = 8 if ELEMENT == tl.float64 else (4 if ELEMENT == tl.float32 else 2)
    address = tl.load(addresses + tl.load(fields)) + tl.load(fields + 1) * size
    return address, tl.load(fields + 2), tl.load(fields + 3)


@triton.jit
def _pointer(address, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the bits of elements; an aligned one is read 16 bytes at a time.

    Bits, because magnitudes are ordered as theirs are, and old devices have no bfloat16.
    """
    if ELEMENT == tl.float64:
        bits: tl.constexpr = tl.int64
    elif ELEMENT == tl.float32:
        bits: tl.constexpr = tl.int32
    else:
        bits: tl.constexpr = tl.int16
    pointer = address.to(tl.pointer_type(bits))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _magnitudes(bits, ELEMENT: tl.constexpr):
    """Return bits without their sign."""
    if ELEMENT == tl.float64:
        return bits & 0x7FFFFFFFFFFFFFFF
    elif ELEMENT == tl.float32:
        return bits & 0x7FFFFFFF
    else:
        return bits & 0x7FFF


@triton.jit
def _read(bits, ELEMENT: tl.constexpr, STATE: tl.constexpr):
    """Return the numbers with these bits."""
    if ELEMENT == tl.bfloat16:
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(STATE)
    else:
        return bits.to(ELEMENT, bitcast=True).to(STATE)


@triton.jit
def _rounded(numbers, ELEMENT: tl.constexpr, BITS: tl.constexpr):
    """Round numbers to the dtype of elements, ties to even, and return the bits."""
    if ELEMENT == tl.bfloat16:
        bits = numbers.to(tl.float32).to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(numbers == numbers, nearest, (bits >> 16) | 0x40).to(BITS)
    else:
        return numbers.to(ELEMENT).to(BITS, bitcast=True)


@triton.jit
def _power_sum(address, length, ORDER: tl.constexpr, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the power sum of a piece; the lanes, and so the bits, ignore its alignment."""
    wide: tl.constexpr = ELEMENT == tl.float64 or (ORDER != 1.0 and ORDER != 2.0)
    state: tl.constexpr = tl.float64 if wide else tl.float32
    if address % 16 == 0:
        lanes, most = _lanes(address, True, length, ORDER, ELEMENT, state, BLOCK)
    else:
        lanes, most = _lanes(address, False, length, ORDER, ELEMENT, state, BLOCK)
    if ORDER == LARGEST:
        # By their bits, where NaN is larger than infinity: a maximum of floats would lose it.
        return _read(tl.max(most, 0).to(most.dtype), ELEMENT, tl.float64)
    total = tl.sum(lanes.to(tl.float64), 0)
    if not wide and ELEMENT != tl.float16:
        # Zeros have the sum 0 too, and need no second read.
        lost = (ORDER == 2.0) & (total < LOW) & (tl.max(most, 0) > 0)
        if lost | (not (total < HIGH)):
            again, _ = _lanes(address, False, length, ORDER, ELEMENT, tl.float64, BLOCK)
            total = tl.sum(again, 0)
    return total


@triton.jit
def _lanes(
    address,
    ALIGNED: tl.constexpr,
    length,
    ORDER: tl.constexpr,
    ELEMENT: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the power sum of every BLOCK-th element, and the bits of the largest magnitude."""
    lane = tl.arange(0, BLOCK)
    at = _pointer(address, ELEMENT, ALIGNED) + lane
    sums = tl.zeros([BLOCK], STATE)
    most = tl.zeros([BLOCK], at.dtype.element_ty)
    whole = length // BLOCK
    for block in range(whole):
        bits = _magnitudes(tl.load(at + block * BLOCK), ELEMENT)
        sums = _with_power(sums, _read(bits, ELEMENT, STATE), ORDER)
        most = tl.maximum(most, bits)
    rest = whole * BLOCK
    if rest < length:
        bits = _magnitudes(tl.load(at + rest, mask=lane < length - rest, other=0), ELEMENT)
        sums = _with_power(sums, _read(bits, ELEMENT, STATE), ORDER)
        most = tl.maximum(most, bits)
    return sums, most


@triton.jit
def _with_power(sums, magnitudes, ORDER: tl.constexpr):
    """Add powers; with an explicit fma, so that the bits do not depend on the compiler's fusion."""
    if ORDER == LARGEST:
        return sums
    elif ORDER == 1.0:
        return sums + magnitudes
    elif ORDER == 2.0:
        return tl.fma(magnitudes, magnitudes, sums)
    else:
        return sums + tl.exp2(ORDER * tl.log2(magnitudes))


@triton.jit
def _combined(one, other, ORDER: tl.constexpr):
    """Combine two power sums, none negative: add them, or take the larger for infinity."""
    if ORDER == LARGEST:
        # As integers, since tl.maximum of floats may drop NaN.
        most = tl.maximum(one.to(tl.int64, bitcast=True), other.to(tl.int64, bitcast=True))
        return most.to(tl.float64, bitcast=True)
    else:
        return one + other


@triton.jit
def _combined_all(sums, first, end, ORDER: tl.constexpr):
    """Combine a range of power sums."""
    lane = tl.arange(0, COMBINED)
    lanes = tl.zeros([COMBINED], tl.float64)
    for at in range(first, end, COMBINED):
        # Other programs have just written them: bypass this processor's own cache.
        part = tl.load(sums + at + lane, mask=at + lane < end, other=0.0, cache_modifier=".cg")
        lanes = _combined(lanes, part, ORDER)
    if ORDER == LARGEST:
        return tl.max(lanes.to(tl.int64, bitcast=True), 0).to(tl.float64, bitcast=True)
    else:
        return tl.sum(lanes, 0)


@triton.jit
def _root(power_sum, ORDER: tl.constexpr):
    if ORDER == LARGEST or ORDER == 1.0:
        return power_sum
    elif ORDER == 2.0:
        return tl.sqrt(power_sum)
    else:
        return tl.exp2(tl.log2(power_sum) / ORDER)


@triton.jit
def _limit(
    weight_norm,
    FACTOR: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return the limit of a row; NaN stays, since it compares false."""
    # Constants of a kernel are float32 unless they are made of another type.
    eps = tl.full((), EPS, tl.float64)
    limit = tl.full((), FACTOR, tl.float64) * tl.where(weight_norm < eps, eps, weight_norm)
    floor, cap = tl.full((), FLOOR, tl.float64), tl.full((), CAP, tl.float64)
    limit = tl.where(limit < floor, floor, limit)
    return tl.where(limit > cap, cap, limit)


@triton.jit
def _is_neutral(number, LIMIT: tl.constexpr, ELEMENT: tl.constexpr):
    """Return whether a coefficient rounds to 1, or a bound is infinite."""
    if LIMIT:
        return number == LARGEST
    elif ELEMENT == tl.float64:
        return number >= 1.0
    else:
        return number >= 1.0 - 2.0**-25


@triton.jit
def _change_piece(
    address,
    length,
    number,
    LIMIT: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Change whole blocks, and the rest in smaller ones, which need fewer registers."""
    narrow = number.to(tl.float64 if ELEMENT == tl.float64 else tl.float32)
    # In float32 the smallest coefficients would round to zero.
    if (not LIMIT) & (number < SMALL):
        _change(address, False, 0, length, number, LIMIT, ELEMENT, BLOCK // 8)
    elif address % 16 == 0:
        whole = length // BLOCK * BLOCK
        _change(address, False, whole, length, narrow, LIMIT, ELEMENT, BLOCK // 8)
        _change(address, True, 0, whole, narrow, LIMIT, ELEMENT, BLOCK)
    else:
        _change(address, False, 0, length, narrow, LIMIT, ELEMENT, BLOCK // 4)


@triton.jit
def _change(
    address,
    ALIGNED: tl.constexpr,
    first,
    end,
    number,
    LIMIT: tl.constexpr,
    ELEMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Change some elements of a piece, computing in the dtype of the number, last block first.

    An aligned range consists of whole blocks. Finite bounds are exact in the dtype of the elements.
    """
    lane = tl.arange(0, BLOCK)
    begin = _pointer(address, ELEMENT, ALIGNED) + first
    blocks = (end - first + BLOCK - 1) // BLOCK
    for back in range(blocks):
        skipped = (blocks - 1 - back) * BLOCK
        at = begin + skipped + lane
        inside = None if ALIGNED else lane < end - first - skipped
        bits = tl.load(at, mask=inside, other=None if ALIGNED else 0)
        elements = _read(bits, ELEMENT, number.dtype)
        if not LIMIT:
            # Zeros also over NaN and infinity, whose product with 0 is NaN.
            product = tl.where(number == 0, 0.0, elements * number)
            tl.store(at, _rounded(product, ELEMENT, bits.dtype), mask=inside)
        elif tl.max((tl.abs(elements) > number).to(tl.int32), 0) > 0:
            # NaN compares false, and stays.
            lower = tl.where(elements < -number, -number, elements)
            limited = tl.where(lower > number, number, lower)
            tl.store(at, _rounded(limited, ELEMENT, bits.dtype), mask=inside)
