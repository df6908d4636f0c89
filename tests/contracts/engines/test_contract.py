"""The contract of every engine: sums, coefficients and bounds of tensors and of their rows."""

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradclip.engines.base import Engine
from gradclip.engines.operators.host import PIECE
from tests.support.engines import (
    CHUNK,
    LEVELS,
    ORDERS,
    SMALL,
    assert_scaled,
    bits,
    channels_last,
    denormals_flushed,
    power_sum,
    random,
    storage,
    vector,
)

tensors_and_rows = pytest.mark.parametrize("rows", [False, True], ids=["tensors", "rows"])


def windows(buffer: Tensor, count: int, width: int, step: int) -> Tensor:
    return buffer.as_strided((count, width), (step, 1), 1)


LAYOUTS = {
    "no rows": lambda dtype: torch.empty(0, 3, dtype=dtype),
    "nothing": lambda dtype: torch.empty(0, dtype=dtype),
    "rows of nothing": lambda dtype: torch.empty(4, 0, dtype=dtype),
    "one": lambda dtype: random(1, dtype=dtype),
    "1-d": lambda dtype: random(9, dtype=dtype),
    "large 1-d": lambda dtype: random(700, dtype=dtype),
    "1-d with gaps": lambda dtype: random(30, dtype=dtype)[::3],
    "one small row": lambda dtype: random(1, 20, dtype=dtype),
    "one large row": lambda dtype: random(1, 10 * PIECE + 3, dtype=dtype),
    "small": lambda dtype: random(6, 5, 2, dtype=dtype),
    "pieces": lambda dtype: random(5, PIECE, dtype=dtype),
    "even pieces": lambda dtype: random(3, 2 * PIECE, dtype=dtype),
    "shorter even pieces": lambda dtype: random(3, 576, dtype=dtype),
    "pieces and a rest": lambda dtype: random(5, 257, dtype=dtype),
    "narrow": lambda dtype: random(200, 7, dtype=dtype),
    "rows longer than a chunk": lambda dtype: random(3, 17 * PIECE + 5, dtype=dtype),
    "transposed": lambda dtype: random(30, 20, dtype=dtype).t(),
    "large transposed": lambda dtype: random(50, 60, dtype=dtype).t(),
    "channels last": lambda dtype: channels_last(4, 3, 5, 5, dtype=dtype),
    "large channels last": lambda dtype: channels_last(8, 16, 5, 5, dtype=dtype),
    "part of channels last": lambda dtype: channels_last(9, 16, 5, 5, dtype=dtype)[1::2],
    "sliced": lambda dtype: random(20, 30, dtype=dtype)[3:17, 5:-4:2],
    "large sliced": lambda dtype: random(60, 500, dtype=dtype)[1:, :400],
    "large with gaps": lambda dtype: random(100, 50, dtype=dtype)[1:, ::2],
    "misaligned": lambda dtype: random(41, dtype=dtype)[1:],
    "large misaligned": lambda dtype: random(1301, dtype=dtype)[1:].view(5, 260),
    "unusual strides": lambda dtype: random(8, dtype=dtype).as_strided((2, 3), (3, 2)),
    "negated": lambda dtype: torch._neg_view(random(5, 300, dtype=dtype)),
    "small negated": lambda dtype: torch._neg_view(random(5, 3, dtype=dtype)),
    "negated with gaps": lambda dtype: torch._neg_view(random(2, 700, dtype=dtype)[:, 1::2]),
    "expanded within rows": lambda dtype: random(7, 1, 3, dtype=dtype).expand(7, 50, 3),
    "small expanded within rows": lambda dtype: random(7, 1, dtype=dtype).expand(7, 5),
    "windows within rows": lambda dtype: random(200, dtype=dtype).as_strided((4, 3, 6), (40, 3, 1)),
    "negated windows": lambda dtype: torch._neg_view(
        random(4000, dtype=dtype).as_strided((4, 30, 20), (900, 10, 1), 3)
    ),
}
WHOLE = {
    "0-d": lambda dtype: torch.tensor(-3.7, dtype=dtype),
    "zeros": lambda dtype: torch.zeros(300, dtype=dtype),
    "longest small": lambda dtype: random(SMALL, dtype=dtype),
    "shortest large": lambda dtype: random(SMALL + 1, dtype=dtype),
    "large pieces and a rest": lambda dtype: random(SMALL + 5 * PIECE - 1, dtype=dtype),
    "one chunk": lambda dtype: random(CHUNK, dtype=dtype),
    "chunks and a rest": lambda dtype: random(2 * CHUNK + PIECE + 3, dtype=dtype),
    "misaligned pieces": lambda dtype: random(SMALL + 3 * PIECE + 7, dtype=dtype)[3:],
    "expanded 0-d": lambda dtype: torch.tensor(0.7, dtype=dtype).expand(5),
    "expanded part": lambda dtype: random(8, 10, dtype=dtype)[1:2].expand(6, 10),
    "large expanded": lambda dtype: random(1, dtype=dtype).expand(SMALL + 9),
    "overlapping": lambda dtype: windows(random(40, dtype=dtype), 9, 5, 3),
    "overlapping with gaps": lambda dtype: random(30, dtype=dtype).as_strided((3, 4), (2, 2), 5),
    "large overlapping": lambda dtype: windows(random(3000, dtype=dtype), 60, 80, 40),
}
"""Tensors that have no rows, too many to look at, or rows that share memory."""


def all_layouts(dtype: torch.dtype, rows: bool) -> list[Tensor]:
    return [make(dtype) for make in (LAYOUTS if rows else LAYOUTS | WHOLE).values()]


def each_and_all(tensors: list[Tensor]) -> list[list[Tensor]]:
    return [*([tensor] for tensor in tensors), tensors]


def parts_of(tensors: list[Tensor], rows: bool) -> list[Tensor]:
    """Return the tensors, or all their rows: what has a sum, a coefficient or a bound."""
    return [row for tensor in tensors for row in tensor] if rows else tensors


def given_as(table: Tensor, rows: bool) -> list[Tensor]:
    """Return the rows of a table as one tensor, or as a tensor each."""
    return [table.clone()] if rows else [row.clone() for row in table]


def joined(tensors: list[Tensor]) -> Tensor:
    """Return what `given_as` was given."""
    return torch.cat([tensor.view(-1, tensor.shape[-1]) for tensor in tensors])


def cycled(pattern: list[float], tensors: list[Tensor], rows: bool) -> Tensor:
    """Return numbers for all parts in turn; a single one serves all."""
    count = 1 if len(pattern) == 1 else len(parts_of(tensors, rows))
    return vector(*itertools.islice(itertools.cycle(pattern), count))


def by_tensor(numbers: Tensor, tensors: list[Tensor], rows: bool) -> Iterator[Tensor]:
    """Yield the numbers of the parts of each tensor, in a shape that fits the tensor."""
    counts = [len(tensor) if rows else 1 for tensor in tensors]
    for tensor, part in zip(tensors, numbers.expand(sum(counts)).split(counts), strict=True):
        yield part.view(-1, *[1] * (tensor.dim() - 1)) if rows else part.view(())


def assert_same(found: Tensor, needed: Tensor) -> None:
    torch.testing.assert_close(found, needed, rtol=0, atol=0, equal_nan=True)


def assert_sums(engine: Engine, tensors: list[Tensor], order: float, rows: bool) -> Tensor:
    sums = engine.power_sums(tensors, order, rows=rows)
    needed = [power_sum(part, order) for part in parts_of(tensors, rows)]
    assert (sums.shape, sums.dtype) == ((len(needed),), torch.float64)
    assert sums.tolist() == pytest.approx(needed, rel=1e-6, abs=0, nan_ok=True)
    return sums


def assert_written(tensor: Tensor, whole: Tensor, chosen: Tensor) -> None:
    """Check that every bit outside the chosen elements is as it was in the whole buffer."""
    index = torch.arange(whole.numel())
    places = index.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    kept = bits(storage(tensor)) == bits(whole)
    kept[places[chosen.expand(tensor.shape)]] = True
    assert bool(kept.all())


# Measuring


@tensors_and_rows
@pytest.mark.parametrize("order", ORDERS)
def test_sums_are_those_of_float64(engine: Engine, rewritten, dtype, order, rows):
    """Of each layout alone and of all, in their order; measured again they have the same bits."""
    tensors = all_layouts(dtype, rows)
    before = [(bits(storage(tensor)), tensor._version) for tensor in tensors]
    for some in each_and_all(tensors):
        sums = assert_sums(engine, some, order, rows)
    assert torch.equal(engine.power_sums(deepcopy(tensors), order, rows=rows), sums)
    for tensor, (old, version) in zip(tensors, before, strict=True):
        assert torch.equal(bits(storage(tensor)), old)
        assert not rewritten(tensor, version)


@pytest.mark.parametrize("order", ORDERS)
def test_sums_beside_the_norm_change_no_bit_of_it(engine: Engine, dtype, order):
    """The norm is that of float64, and the sums beside it are those measured alone."""
    tensors = all_layouts(dtype, rows=False)
    for some in (*each_and_all(tensors), tensors[-3:], [random(7, dtype=dtype)] * 100):
        sums = [power_sum(tensor, order) for tensor in some]
        needed = max(sums) if order == math.inf else math.fsum(sums) ** (1 / order)
        norm = engine.norm(some, order)
        assert (norm.dtype, norm.shape) == (torch.float64, (1,))
        assert norm.item() == pytest.approx(needed, rel=1e-6, abs=0)
        assert torch.equal(engine.norm(deepcopy(some), order), norm)
        beside, sums = engine.norm_and_sums(some, order)
        assert torch.equal(beside, norm)
        assert torch.equal(sums, engine.power_sums(some, order))


@tensors_and_rows
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [3, SMALL + 100, 17 * PIECE])
def test_nan_and_infinity_reach_their_own_sum_alone(engine: Engine, dtype, order, width, rows):
    table = torch.ones(5, width, dtype=dtype)
    table[1, 1], table[2, -1] = math.nan, -math.inf
    table[4, 0], table[4, -2] = math.inf, math.nan
    tensors = given_as(table, rows)
    assert_sums(engine, tensors, order, rows)
    if not rows:
        assert engine.norm(tensors[::2][:2], order).item() == math.inf
        assert math.isnan(engine.norm(tensors[:2], order).item())


@pytest.mark.parametrize("kind", ["constant", "random", "spike"])
@pytest.mark.parametrize("shape", [(100, 7), (20, 147), (10, 521), (5, 4608), (2, 300_001)])
def test_rows_of_any_length_keep_the_accuracy(engine: Engine, dtype, shape, kind):
    tensor = torch.full(shape, 0.7).to(dtype) if kind == "constant" else random(*shape, dtype=dtype)
    if kind == "spike":
        tensor *= 1e-3
        tensor[:, -1] = 1e4
    with_gaps = torch.cat([tensor, tensor[:, :3]], 1)[:, :-3]
    for order in (1.0, 2.0, math.inf):
        assert_sums(engine, [tensor, with_gaps], order, rows=True)


UNLIKE = [0.0, 1e20, 1.0, 3e38, 1e-25, -1e-39, 1e-30, -0.0, 1e-45, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 300, 512, 17 * PIECE])
def test_rows_of_every_magnitude_have_their_true_sum(engine: Engine, dtype, width):
    values = torch.tensor(UNLIKE, dtype=dtype).repeat(9)
    tensors = [values.unsqueeze(1).repeat(1, width), values.unsqueeze(1).expand(-1, 700)]
    for order in (1.0, 2.0, math.inf):
        assert_sums(engine, tensors, order, rows=True)


on_the_cpu = pytest.mark.parametrize("engine", ["operators", *LEVELS], indirect=True)
flushed = pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])


@on_the_cpu
@flushed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 300, 9000, 40_000])
def test_denormals_count_where_the_processor_takes_them_for_zero(engine, dtype, width, flush):
    """Alone, beside zeros and beside larger elements, of which a low power is not much larger."""
    mixed = torch.zeros(2, width)
    mixed[:, 0], mixed[1, -1] = -1e-39, 0.5
    alike = torch.tensor([*UNLIKE, 1.2e-38]).unsqueeze(1).repeat(1, width)
    table = torch.cat([alike, mixed]).to(dtype)
    for order in (0.1, 1.0, 2.0, math.inf):
        needed = [power_sum(row, order) for row in table]
        with denormals_flushed(flush):
            rows = engine.power_sums([table, torch._neg_view(table)], order, rows=True)
            sums = engine.power_sums([*table], order)
            norms = [engine.norm([row], order).item() for row in table]
            as_before = float(torch.tensor([1e-39]).mul(1.0)) == 0
        assert rows.tolist() == pytest.approx(2 * needed, rel=1e-6, abs=0)
        assert sums.tolist() == pytest.approx(needed, rel=1e-6, abs=0)
        roots = needed if order == math.inf else [power ** (1 / order) for power in needed]
        assert norms == pytest.approx(roots, rel=1e-6, abs=0)
        assert as_before == flush


@on_the_cpu
@flushed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_exactly(engine, dtype, flush):
    """Of float32 those whose other bits are zero; NaN of every payload and infinity among them."""
    integers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    shifted = integers << 16 if dtype is torch.float32 else integers.to(torch.int16)
    values = shifted.view(dtype).unsqueeze(1)
    finite = values[values.isfinite()]
    repeated = finite.unsqueeze(1).repeat(1, 8200)[::997]  # long enough for quick sums
    needed = values.double().abs().flatten(), repeated.double().square().sum(1)
    with denormals_flushed(flush):
        found = [engine.power_sums([values], order, rows=True) for order in (1.0, math.inf)]
        squares = engine.power_sums([repeated], 2.0, rows=True)
    for sums in found:
        assert_same(sums, needed[0])
    torch.testing.assert_close(squares, needed[1], rtol=1e-6, atol=0)


# Scaling


@tensors_and_rows
@pytest.mark.parametrize(
    "pattern",
    [[0.3], [1e-5], [1.0, 0.3, 1.0, 0.0, 0.999, 1e-5, 1.0], [1.0] * 40 + [0.5]],
)
def test_every_place_is_multiplied_once_by_its_coefficient(engine: Engine, dtype, pattern, rows):
    """And nothing is written where the coefficient is 1, or around the tensor."""
    for tensors in each_and_all(all_layouts(dtype, rows)):
        wholes = [storage(tensor).clone() for tensor in tensors]
        originals = [tensor.clone() for tensor in tensors]
        coefficients = cycled(pattern, tensors, rows)
        engine.scale_(tensors, coefficients, rows=rows)
        each = by_tensor(coefficients, tensors, rows)
        for tensor, original, whole, own in zip(tensors, originals, wholes, each, strict=True):
            assert_scaled(tensor, original, own)
            assert_written(tensor, whole, own != 1)


@tensors_and_rows
def test_a_coefficient_that_rounds_to_one_writes_nothing(engine: Engine, rewritten, dtype, rows):
    """Beside a NaN as well."""
    tensors = all_layouts(dtype, rows)
    for tensor in tensors:
        storage(tensor)[::3] = math.nan
    before = [(storage(tensor).clone(), tensor._version) for tensor in tensors]
    narrow = dtype is not torch.float64
    for pattern in ([1.0], *([[1 - 2.0**-25], [1.0, 1 - 2.0**-25, 1 - 2.0**-30]] * narrow)):
        for some in each_and_all(tensors):
            engine.scale_(some, cycled(pattern, some, rows), rows=rows)
    for tensor, (old, version) in zip(tensors, before, strict=True):
        assert_same(storage(tensor), old)
        assert not rewritten(tensor, version)


def test_the_largest_coefficient_below_one_is_applied_to_float64(engine: Engine):
    tensor = torch.ones(3, dtype=torch.float64)
    engine.scale_([tensor], vector(1 - 2.0**-53))
    assert tensor.tolist() == [1 - 2.0**-53] * 3


@tensors_and_rows
def test_among_several_tensors_only_those_that_change_are_written(
    engine: Engine, rewritten, dtype, rows
):
    """Autograd sees by its version that a tensor was written."""
    numbers = vector(1, 1, *[1] * rows, 0.5, *[1] * rows)
    tensors = [torch.full((1 + rows, 300), value, dtype=dtype) for value in (math.nan, 0.75)]
    tensors.insert(1, torch.ones(1, 5, dtype=dtype))
    for verb, value in ((engine.clamp_, 0.5), (engine.scale_, 0.25)):
        versions = [tensor._version for tensor in tensors]
        rewritten.forget()
        verb(tensors, numbers, rows=rows)
        assert not any(map(rewritten, tensors[:2], versions[:2]))
        assert tensors[2]._version > versions[2]
        assert tensors[2][0].tolist() == [value] * 300


@tensors_and_rows
def test_a_coefficient_of_zero_erases_nan_and_infinity_too(engine: Engine, dtype, rows):
    for pattern in ([0.0], [0.0, 1.0]):
        for tensors in each_and_all(all_layouts(dtype, rows)):
            for tensor in tensors:
                storage(tensor).fill_(math.nan)[::2] = -math.inf
            coefficients = cycled(pattern, tensors, rows)
            engine.scale_(tensors, coefficients, rows=rows)
            for tensor, own in zip(tensors, by_tensor(coefficients, tensors, rows), strict=True):
                assert torch.equal(tensor == 0, (own == 0).expand(tensor.shape))


@tensors_and_rows
@pytest.mark.parametrize("width", [3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_coefficients_keep_their_value(engine: Engine, dtype, width, rows):
    """Also those below the normal numbers of float32, together and alone."""
    each = vector(1e-38, 3e-40, 1.0, 1e-45, 1e-60, 0.5, 1e-74)
    table = torch.full((len(each), width), -3e38).to(dtype)
    tensors = given_as(table, rows)
    engine.scale_(tensors, each, rows=rows)
    assert_scaled(joined(tensors), table, each.unsqueeze(1))
    assert bool((joined(tensors) != 0).all())
    for coefficient in each:
        tensors = given_as(table, rows)
        engine.scale_(tensors, coefficient.view(1), rows=rows)
        assert_scaled(joined(tensors), table, coefficient)
        assert bool((joined(tensors) != 0).all())


# Clamping


@tensors_and_rows
@pytest.mark.parametrize("pattern", [[0.1], [0.0], [0.5, math.inf, 0.1, 100.0, 0.0]])
def test_every_element_is_limited_by_its_bound(engine: Engine, rewritten, dtype, pattern, rows):
    """And what fits is not written: again, 0.1 is in no binary dtype, and fits itself rounded."""
    for tensors in each_and_all(all_layouts(dtype, rows)):
        wholes = [storage(tensor).clone() for tensor in tensors]
        originals = [tensor.clone() for tensor in tensors]
        bounds = cycled(pattern, tensors, rows)
        engine.clamp_(tensors, bounds, rows=rows)
        each = by_tensor(bounds.to(dtype), tensors, rows)
        for tensor, original, whole, own in zip(tensors, originals, wholes, each, strict=True):
            assert torch.equal(tensor, original.clamp(-own, own))
            assert_written(tensor, whole, original.abs() > own)
        versions = [tensor._version for tensor in tensors]
        rewritten.forget()
        engine.clamp_(tensors, bounds, rows=rows)
        assert not any(map(rewritten, tensors, versions))


@tensors_and_rows
@pytest.mark.parametrize("width", [4, SMALL + 4])
def test_nan_stays_and_hides_no_larger_element(engine: Engine, rewritten, dtype, width, rows):
    """An infinite bound leaves everything."""
    table = torch.zeros(5, width, dtype=dtype)
    table[:, 0] = math.nan
    table[1, 1], table[2, 2], table[3, -1] = 3.0, -math.inf, math.inf
    tensors = given_as(table, rows)
    versions = [tensor._version for tensor in tensors]
    rewritten.forget()
    for bounds in (vector(math.inf), vector(1, 5, math.inf, math.inf, 0)):
        engine.clamp_(tensors, bounds, rows=rows)
    assert not any(map(rewritten, tensors, versions))
    assert_same(joined(tensors), table)
    engine.clamp_(tensors, vector(1, 1, 2, math.inf, 0), rows=rows)
    table[1, 1], table[2, 2] = 1.0, -2.0
    assert_same(joined(tensors), table)


def test_a_bound_beyond_the_dtype_limits_infinity_to_its_largest_number(engine: Engine):
    for dtype, bound in ((torch.float16, 1e5), (torch.float32, 1e39), (torch.bfloat16, 1e39)):
        tensor = torch.tensor([-math.inf, 1.0, math.inf], dtype=dtype)
        engine.clamp_([tensor], vector(bound))
        largest = torch.finfo(dtype).max
        assert tensor.tolist() == [-largest, 1.0, largest]


READ_ONLY = """
import ctypes, math, mmap, sys, torch
from gradclip.engines import engine_for
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 8 * page)
table = torch.frombuffer(memory, dtype=torch.float32).view(8, -1).fill_(2.0)
kept = [0, 2, 3, 6]
protect = ctypes.CDLL(None, use_errno=True).mprotect
for row in kept:
    address = ctypes.c_void_p(table[row].data_ptr())
    assert protect(address, ctypes.c_size_t(page), mmap.PROT_READ) == 0
engine = engine_for(sys.argv[1], table.device)
for verb, to_keep, result in ("scale_", 1, 1.0), ("clamp_", math.inf, 0.5), ("scale_", 1, 0.0):
    numbers = torch.full((8,), min(result, 0.5), dtype=torch.float64)
    numbers[kept] = to_keep
    with torch.no_grad():
        getattr(engine, verb)([table, torch.ones(0, 3)], numbers, rows=True)
    assert table[:, -1].tolist() == [2.0 if row in kept else result for row in range(8)]
"""


def test_rows_to_leave_may_lie_in_read_only_memory(cpu_engine: Engine):
    command = [sys.executable, "-c", READ_ONLY, cpu_engine.name]
    subprocess.run(command, check=True, timeout=120)


# Any shape and strides


@st.composite
def strided_tensors(draw) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    shape = draw(st.lists(st.integers(0, 7), min_size=1, max_size=3))
    if draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] *= draw(st.sampled_from([50, 64, 101]))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in shape]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = [shape[axis] * steps[axis] for axis in order]
    buffer = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    permuted = buffer.permute([order.index(axis) for axis in range(len(shape))])
    tensor = permuted[tuple(slice(None, None, step) for step in steps)]
    return torch._neg_view(tensor) if draw(st.integers(0, 4)) == 0 else tensor


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.lists(strided_tensors(), min_size=1, max_size=3).map(
        lambda found: [tensor for tensor in found if tensor.dtype is found[0].dtype]
    ),
    pattern=st.lists(st.sampled_from([1.0, 1.0, 0.5, 0.0, 0.3, 1e-42]), min_size=1, max_size=9),
    order=st.sampled_from(ORDERS),
    rows=st.sampled_from([True, True, False]),
)
def test_any_strides_are_measured_and_written(engine: Engine, tensors, pattern, order, rows):
    assert_sums(engine, tensors, order, rows)
    for verb in (engine.scale_, engine.clamp_):
        wholes = [storage(tensor).clone() for tensor in tensors]
        originals = [tensor.clone() for tensor in tensors]
        numbers = cycled(pattern, tensors, rows)
        verb(tensors, numbers, rows=rows)
        each = by_tensor(numbers, tensors, rows)
        for tensor, original, whole, own in zip(tensors, originals, wholes, each, strict=True):
            if verb == engine.scale_:
                assert_scaled(tensor, original, own)
                assert_written(tensor, whole, own != 1)
            else:
                limit = own.to(tensor.dtype)
                assert torch.equal(tensor, original.clamp(-limit, limit))
                # A bound of 0 may change the sign of a zero.
                assert_written(tensor, whole, (original.abs() > limit) | (limit == 0))
