"""The contract of every engine with ``rows=True``: a number for each index of dimension 0."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradclip.engines.base import Engine
from gradclip.engines.operators.host import PIECE
from tests.support.engines import (
    ORDERS,
    assert_scaled,
    bits,
    channels_last,
    power_sum,
    random,
    storage,
    vector,
)

LAYOUTS = {
    "no rows": lambda dtype: torch.empty(0, 3, dtype=dtype),
    "nothing": lambda dtype: torch.empty(0, dtype=dtype),
    "rows of nothing": lambda dtype: torch.empty(4, 0, dtype=dtype),
    "1-d": lambda dtype: random(9, dtype=dtype),
    "large 1-d": lambda dtype: random(700, dtype=dtype),
    "1-d with gaps": lambda dtype: random(30, dtype=dtype)[::3],
    "one small row": lambda dtype: random(1, 20, dtype=dtype),
    "one large row": lambda dtype: random(1, 10 * PIECE + 3, dtype=dtype),
    "small": lambda dtype: random(6, 5, 2, dtype=dtype),
    "even pieces": lambda dtype: random(3, 2 * PIECE, dtype=dtype),
    "shorter even pieces": lambda dtype: random(3, 576, dtype=dtype),
    "pieces and a rest": lambda dtype: random(5, 257, dtype=dtype),
    "narrow": lambda dtype: random(200, 7, dtype=dtype),
    "rows longer than a chunk": lambda dtype: random(3, 17 * PIECE + 5, dtype=dtype),
    "large transposed": lambda dtype: random(50, 60, dtype=dtype).t(),
    "channels last": lambda dtype: channels_last(8, 16, 5, 5, dtype=dtype),
    "part of channels last": lambda dtype: channels_last(9, 16, 5, 5, dtype=dtype)[1::2],
    "sliced": lambda dtype: random(20, 30, dtype=dtype)[3:17, 5:-4:2],
    "large sliced": lambda dtype: random(60, 500, dtype=dtype)[1:, :400],
    "large with gaps": lambda dtype: random(100, 50, dtype=dtype)[1:, ::2],
    "misaligned": lambda dtype: random(1301, dtype=dtype)[1:].view(5, 260),
    "negated": lambda dtype: torch._neg_view(random(5, 300, dtype=dtype)),
    "small negated": lambda dtype: torch._neg_view(random(5, 3, dtype=dtype)),
    "expanded within rows": lambda dtype: random(7, 1, 3, dtype=dtype).expand(7, 50, 3),
    "small expanded within rows": lambda dtype: random(7, 1, dtype=dtype).expand(7, 5),
    "windows within rows": lambda dtype: random(200, dtype=dtype).as_strided((4, 3, 6), (40, 3, 1)),
    "negated windows": lambda dtype: torch._neg_view(
        random(4000, dtype=dtype).as_strided((4, 30, 20), (900, 10, 1), 3)
    ),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def row_layout(request):
    return request.param


def all_layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    return [make(dtype) for make in LAYOUTS.values()]


def all_rows(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [row for tensor in tensors for row in tensor]


def places(tensor: torch.Tensor) -> torch.Tensor:
    """The index in its storage of every element, so that rows of it tell whose memory is whose."""
    index = torch.arange(storage(tensor).numel())
    return index.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_row_sums(engine: Engine, tensors: list[torch.Tensor], order: float) -> None:
    sums = engine.power_sums(tensors, order, rows=True)
    needed = [power_sum(row, order) for row in all_rows(tensors)]
    assert sums.shape == (len(needed),)
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx(needed, rel=1e-6, abs=0, nan_ok=True)


# Measuring


@pytest.mark.parametrize("order", ORDERS)
def test_row_sums_are_those_of_float64(engine: Engine, rewritten, dtype, order):
    """Of each layout alone and of all, in their order; measured again they have the same bits."""
    tensors = all_layouts(dtype)
    before = [(bits(storage(tensor)), tensor._version) for tensor in tensors]
    for some in (tensors, *([tensor] for tensor in tensors)):
        assert_row_sums(engine, some, order)
    copies = [tensor.clone() for tensor in tensors]
    first = engine.power_sums(tensors, order, rows=True)
    assert torch.equal(engine.power_sums(copies, order, rows=True), first)
    for tensor, (old, version) in zip(tensors, before, strict=True):
        assert torch.equal(bits(storage(tensor)), old)
        assert not rewritten(tensor, version)


@pytest.mark.parametrize("shape", [(6, 3), (6, 500), (6, 17 * PIECE)])
@pytest.mark.parametrize("order", ORDERS)
def test_nan_and_infinity_stay_in_their_row(engine: Engine, dtype, order, shape):
    tensor = torch.ones(shape, dtype=dtype)
    tensor[1, 1], tensor[2, -1] = math.nan, -math.inf
    tensor[4, :2] = torch.tensor([math.inf, math.nan])
    assert_row_sums(engine, [tensor, torch.ones_like(tensor)], order)


@pytest.mark.parametrize("kind", ["constant", "random", "spike"])
@pytest.mark.parametrize("shape", [(100, 7), (20, 147), (10, 521), (5, 4608), (2, 300_001)])
def test_rows_of_any_length_keep_the_accuracy(engine: Engine, dtype, shape, kind):
    tensor = torch.full(shape, 0.7).to(dtype) if kind == "constant" else random(*shape, dtype=dtype)
    if kind == "spike":
        tensor *= 1e-3
        tensor[:, -1] = 1e4
    for order in (1.0, 2.0, math.inf):
        assert_row_sums(engine, [tensor], order)


UNLIKE = [0.0, 1e20, 1.0, 3e38, 1e-25, -1e-39, 1e-30, -0.0, 1e-44, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 300, 512, 17 * PIECE])
def test_rows_of_every_magnitude_have_their_true_sum(engine: Engine, dtype, width):
    values = torch.tensor(UNLIKE, dtype=dtype).repeat(9)
    tensors = [values.unsqueeze(1).repeat(1, width), values.unsqueeze(1).expand(-1, 700)]
    for order in (1.0, 2.0, math.inf):
        assert_row_sums(engine, tensors, order)


# Scaling


def assert_written_rows(tensors, originals, written) -> None:
    """Check that every bit outside the rows that may be written is as it was."""
    flags = iter(written)
    for tensor, original in zip(tensors, originals, strict=True):
        allowed = torch.zeros(storage(tensor).numel(), dtype=torch.bool)
        for place in places(tensor):
            allowed[place.flatten()] = next(flags)
        kept = bits(storage(tensor)) == bits(original)
        assert bool((kept | allowed).all())


COEFFICIENTS = [1.0, 0.3, 1.0, 0.0, 0.999, 1e-5, 1.0]


@pytest.mark.parametrize("pattern", [COEFFICIENTS, [0.5, 0.25, 0.3], [1.0] * 40 + [0.5]])
def test_each_row_is_multiplied_by_its_own_coefficient(engine: Engine, dtype, pattern):
    tensors = all_layouts(dtype)
    whole = [storage(tensor).clone() for tensor in tensors]
    originals = [row.clone() for row in all_rows(tensors)]
    each = [*itertools.islice(itertools.cycle(pattern), len(originals))]
    engine.scale_(tensors, vector(*each), rows=True)
    for row, original, coefficient in zip(all_rows(tensors), originals, each, strict=True):
        assert_scaled(row, original, coefficient)
    assert_written_rows(tensors, whole, [coefficient != 1 for coefficient in each])


def test_tensors_without_a_row_below_one_are_not_written(engine: Engine, rewritten, dtype):
    tensors = [torch.full((3, 300), math.nan, dtype=dtype), torch.ones(2, 5, dtype=dtype)]
    versions = [tensor._version for tensor in tensors]
    nearly = 1.0 if dtype is torch.float64 else 1 - 2.0**-25
    engine.scale_(tensors, vector(1, nearly, 1, 1, nearly), rows=True)
    assert not any(map(rewritten, tensors, versions))
    engine.scale_(tensors, vector(1, nearly, 1, 1, 0.5), rows=True)
    assert not rewritten(tensors[0], versions[0])
    assert tensors[1].tolist() == [[1.0] * 5, [0.5] * 5]


def test_a_row_coefficient_of_zero_erases_nan_and_infinity_too(engine: Engine, row_layout, dtype):
    for share in (1, 2):
        tensor = row_layout(dtype)
        for row in tensor:
            row.fill_(math.nan)
        engine.scale_([tensor], torch.arange(len(tensor)).remainder(share).double(), rows=True)
        assert not bool((tensor[::share] != 0).any())
        assert bool(tensor[1::2].isnan().all()) or share == 1


@pytest.mark.parametrize("width", [3, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_row_coefficients_keep_their_value(engine: Engine, dtype, width):
    each = [1e-38, 3e-40, 1.0, 1e-45, 1e-60, 0.5, 1e-74]
    tensor = torch.full((len(each), width), -3e38).to(dtype)
    original = tensor.clone()
    engine.scale_([tensor], vector(*each), rows=True)
    for row, before, coefficient in zip(tensor, original, each, strict=True):
        assert_scaled(row, before, coefficient)
        assert bool((row != 0).all())


# Clamping


def test_each_row_is_limited_by_its_own_bound(engine: Engine, dtype):
    tensors = all_layouts(dtype)
    whole = [storage(tensor).clone() for tensor in tensors]
    originals = [row.clone() for row in all_rows(tensors)]
    each = [*itertools.islice(itertools.cycle([0.5, math.inf, 0.1, 100.0, 0.0]), len(originals))]
    engine.clamp_(tensors, vector(*each), rows=True)
    written = []
    for row, original, bound in zip(all_rows(tensors), originals, each, strict=True):
        needed = original.clamp(-bound, bound)
        assert torch.equal(row, needed)
        written.append(not torch.equal(needed, original))
    assert_written_rows(tensors, whole, written)


@pytest.mark.parametrize("width", [4, 900])
def test_nan_stays_in_rows_that_are_limited_and_hides_nothing(
    engine: Engine, rewritten, dtype, width
):
    tensor = torch.zeros(5, width, dtype=dtype)
    tensor[:, 0] = math.nan
    tensor[1, 1], tensor[2, 2], tensor[3, -1] = 3.0, -math.inf, math.inf
    version = tensor._version
    engine.clamp_([tensor], vector(1, 5, math.inf, math.inf, 0), rows=True)
    assert not rewritten(tensor, version)
    engine.clamp_([tensor], vector(1, 1, 2, math.inf, 0), rows=True)
    assert (tensor[1, 1], tensor[2, 2], tensor[3, -1]) == (1.0, -2.0, math.inf)
    assert bool(tensor[:, 0].isnan().all())
    assert int(tensor.isnan().sum()) == 5


def test_rows_that_fit_their_bound_are_not_written(engine: Engine, rewritten, row_layout, dtype):
    tensor = row_layout(dtype)
    engine.clamp_([tensor], torch.full((len(tensor),), 0.1, dtype=torch.float64), rows=True)
    version = tensor._version  # 0.1 is in no binary dtype, and the rounded bound fits itself
    rewritten.forget()
    engine.clamp_([tensor], torch.full((len(tensor),), 0.1, dtype=torch.float64), rows=True)
    assert not rewritten(tensor, version)


def test_one_number_serves_all_rows(engine: Engine, dtype):
    tensor = torch.tensor([[4.0, 1.0], [0.5, 0.25], [2.0, -8.0]], dtype=dtype)
    for tensors in ([tensor], [torch.empty(0, 2, dtype=dtype), tensor[:1]]):
        engine.clamp_(tensors, vector(1.0), rows=True)
        engine.scale_(tensors, vector(0.5), rows=True)
    assert tensor.tolist() == [[0.25, 0.25], [0.25, 0.125], [0.5, -0.5]]


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


def test_rows_to_leave_may_lie_in_read_only_memory(engine):
    subprocess.run([sys.executable, "-c", READ_ONLY, engine.name], check=True, timeout=120)


# Any shape and strides


@st.composite
def strided_tensors(draw) -> torch.Tensor:
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
    numbers=st.lists(st.sampled_from([1.0, 1.0, 0.5, 0.0, 0.3, 1e-42]), min_size=1, max_size=9),
    order=st.sampled_from(ORDERS),
)
def test_any_strides_are_measured_and_written_row_by_row(engine: Engine, tensors, numbers, order):
    assert_row_sums(engine, tensors, order)
    count = sum(map(len, tensors))
    for verb in (engine.scale_, engine.clamp_):
        each = [*itertools.islice(itertools.cycle(numbers), count)]
        whole = [storage(tensor).clone() for tensor in tensors]
        originals = [row.clone() for row in all_rows(tensors)]
        verb(tensors, vector(*each), rows=True)
        for row, original, number in zip(all_rows(tensors), originals, each, strict=True):
            if verb == engine.scale_:
                assert_scaled(row, original, number)
            else:
                limit = torch.tensor(number, dtype=row.dtype)
                assert torch.equal(row, original.clamp(-limit, limit))
        kept = [1.0] if verb == engine.scale_ else []
        assert_written_rows(tensors, whole, [number not in kept for number in each])
