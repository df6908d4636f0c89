"""The contract of every engine, for whole tensors."""

from __future__ import annotations

import math

import pytest
import torch

from gradclip.engines.base import Engine
from gradclip.engines.operators.host import PIECE
from tests.support.engines import (
    CHUNK,
    ORDERS,
    SMALL,
    assert_scaled,
    bits,
    channels_last,
    power_sum,
    random,
    storage,
    vector,
)


def windows(buffer: torch.Tensor, count: int, width: int, step: int) -> torch.Tensor:
    return buffer.as_strided((count, width), (step, 1), 1)


LAYOUTS = {
    "0-d": lambda dtype: torch.tensor(-3.7, dtype=dtype),
    "empty": lambda dtype: torch.empty(0, dtype=dtype),
    "empty matrix": lambda dtype: torch.empty(3, 0, dtype=dtype),
    "one": lambda dtype: random(1, dtype=dtype),
    "small": lambda dtype: random(5, 7, dtype=dtype),
    "longest small": lambda dtype: random(SMALL, dtype=dtype),
    "shortest large": lambda dtype: random(SMALL + 1, dtype=dtype),
    "whole pieces": lambda dtype: random(5, PIECE, dtype=dtype),
    "pieces and a rest": lambda dtype: random(SMALL + 5 * PIECE - 1, dtype=dtype),
    "one chunk": lambda dtype: random(CHUNK, dtype=dtype),
    "chunks and a rest": lambda dtype: random(2 * CHUNK + PIECE + 3, dtype=dtype),
    "transposed": lambda dtype: random(30, 20, dtype=dtype).t(),
    "large transposed": lambda dtype: random(50, 60, dtype=dtype).t(),
    "channels last": lambda dtype: channels_last(4, 3, 5, 5, dtype=dtype),
    "large channels last": lambda dtype: channels_last(8, 16, 5, 5, dtype=dtype),
    "sliced": lambda dtype: random(20, 30, dtype=dtype)[3:17, 5:-4:2],
    "large sliced": lambda dtype: random(100, 50, dtype=dtype)[1:, ::2],
    "expanded": lambda dtype: random(7, 1, dtype=dtype).expand(7, 9),
    "large expanded": lambda dtype: random(1, dtype=dtype).expand(SMALL + 9),
    "overlapping": lambda dtype: windows(random(40, dtype=dtype), 9, 5, 3),
    "large overlapping": lambda dtype: windows(random(3000, dtype=dtype), 60, 80, 40),
    "misaligned": lambda dtype: random(41, dtype=dtype)[1:],
    "large misaligned": lambda dtype: random(SMALL + 3 * PIECE + 7, dtype=dtype)[3:],
    "unusual strides": lambda dtype: random(8, dtype=dtype).as_strided((2, 3), (3, 2)),
}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


# Measuring


@pytest.mark.parametrize("order", ORDERS)
def test_sums_and_norms_are_those_of_float64(engine: Engine, dtype, order):
    """Of each layout alone and of all together; measured again they have the same bits."""
    tensors = [make(dtype) for make in LAYOUTS.values()]
    before = [(bits(storage(tensor)), tensor._version) for tensor in tensors]
    expected = [power_sum(tensor, order) for tensor in tensors]
    sums = engine.power_sums(tensors, order)
    assert (sums.dtype, sums.shape) == (torch.float64, (len(tensors),))
    assert sums.tolist() == pytest.approx(expected, rel=1e-6, abs=0)
    total = max(expected) if order == math.inf else math.fsum(expected)
    singles = [([tensor], sum_) for tensor, sum_ in zip(tensors, expected, strict=True)]
    for some, needed in [(tensors, total), *singles]:
        alone = engine.power_sums(some, order)
        norm = engine.norm(some, order)
        assert (norm.dtype, norm.shape) == (torch.float64, (1,))
        root = needed if order == math.inf else needed ** (1 / order)
        assert norm.item() == pytest.approx(root, rel=1e-6, abs=0)
        if len(some) == 1:
            assert alone.item() == pytest.approx(needed, rel=1e-6, abs=0)
    copies = [tensor.clone() for tensor in tensors]
    for measure in (engine.power_sums, engine.norm):
        assert torch.equal(measure(tensors, order), measure(copies, order))
    for tensor, (old, version) in zip(tensors, before, strict=True):
        assert torch.equal(bits(storage(tensor)), old)
        assert tensor._version == version


@pytest.mark.parametrize("order", ORDERS)
def test_sums_beside_the_norm_are_the_same_and_change_no_bit_of_it(engine: Engine, dtype, order):
    everything = [make(dtype) for make in LAYOUTS.values()]
    for tensors in (everything, everything[:1], everything[-3:], [random(7, dtype=dtype)] * 100):
        norm, sums = engine.norm_and_sums(tensors, order)
        assert (norm.shape, sums.shape) == ((1,), (len(tensors),))
        assert torch.equal(norm, engine.norm(tensors, order))
        assert torch.equal(sums, engine.power_sums(tensors, order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [6, SMALL + 100, 2 * CHUNK + 5])
def test_nan_and_infinity_reach_the_sum_of_their_tensor_alone(engine: Engine, dtype, order, size):
    tensors = [torch.ones(size, dtype=dtype) for _ in range(4)]
    tensors[1][size // 2] = math.nan
    tensors[2][-1] = -math.inf
    tensors[3][0], tensors[3][-2] = math.nan, math.inf
    sums = engine.power_sums(tensors, order).tolist()
    needed = [1 if order == math.inf else size, math.nan, math.inf, math.nan]
    assert sums == pytest.approx(needed, rel=1e-6, nan_ok=True)
    assert engine.norm(tensors[::2], order).item() == math.inf
    assert math.isnan(engine.norm(tensors[:2], order).item())


# Scaling


def test_scaling_multiplies_every_place_once(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for coefficient in (0.3, 0.999, 1e-5):
        original = tensor.clone()
        engine.scale_([tensor], vector(coefficient))
        assert_scaled(tensor, original, coefficient)


def test_one_coefficient_serves_all_or_each_has_its_own(engine: Engine, dtype):
    tensors = [make(dtype) for make in LAYOUTS.values()]
    each = [0.1 * (index % 10) + 0.05 for index in range(len(tensors))]
    for given, needed in (([0.25], [0.25] * len(tensors)), (each, each)):
        originals = [tensor.clone() for tensor in tensors]
        engine.scale_(tensors, vector(*given))
        for tensor, original, coefficient in zip(tensors, originals, needed, strict=True):
            assert_scaled(tensor, original, coefficient)


def test_a_coefficient_that_rounds_to_one_writes_nothing(engine: Engine, rewritten, layout, dtype):
    tensor = layout(dtype)
    if tensor.numel() and tensor.dim():
        tensor[(0,) * tensor.dim()] = math.nan
    before, version = bits(storage(tensor)), tensor._version
    narrow = dtype is not torch.float64
    for coefficient in [1.0] + [1 - 2.0**-25, 1 - 2.0**-30] * narrow:
        engine.scale_([tensor], vector(coefficient))
        engine.scale_([tensor, tensor], vector(coefficient, coefficient))
    assert not rewritten(tensor, version)
    assert torch.equal(bits(storage(tensor)), before)


def test_the_largest_coefficient_below_one_is_applied_to_float64(engine: Engine):
    tensor = torch.ones(3, dtype=torch.float64)
    engine.scale_([tensor], vector(1 - 2.0**-53))
    assert tensor.tolist() == [1 - 2.0**-53] * 3


def test_among_several_only_those_below_one_are_written(engine: Engine, rewritten, dtype):
    tensors = [torch.ones(5, dtype=dtype) for _ in range(3)]
    versions = [tensor._version for tensor in tensors]
    engine.scale_(tensors, vector(1.0, 0.5, 1.0))
    assert [tensor[0].item() for tensor in tensors] == [1.0, 0.5, 1.0]
    assert not rewritten(tensors[0], versions[0])
    assert not rewritten(tensors[2], versions[2])


def test_a_coefficient_of_zero_erases_nan_and_infinity_too(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    if tensor.numel():
        tensor.as_strided((1,), (1,))[0] = math.nan
        if tensor.numel() > 1:
            tensor[(-1,) * tensor.dim()] = -math.inf
    engine.scale_([tensor], vector(0.0))
    assert not bool((tensor != 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_coefficient_below_the_normal_float32_numbers_keeps_its_value(engine: Engine, dtype):
    for coefficient in (1e-38, 3e-40, 1e-45, 1e-60, 1e-74):
        tensor = torch.full((5,), 3e38, dtype=dtype)
        tensor[1] = -tensor[0]
        original = tensor.clone()
        engine.scale_([tensor], vector(coefficient))
        assert_scaled(tensor, original, coefficient)
        assert bool((tensor != 0).all())


@pytest.mark.parametrize("verb", ["scale_", "clamp_"])
def test_writing_a_view_leaves_the_buffer_around_it(engine: Engine, dtype, verb):
    for make in (
        lambda buffer: buffer[2:5, 3:7],
        lambda buffer: buffer[:, ::2],
        lambda buffer: buffer[1:2].expand(6, 10),
        lambda buffer: buffer.as_strided((3, 4), (2, 2), 5),
        lambda buffer: buffer.as_strided((2, 3), (12, 1), 7),
    ):
        buffer = random(8, 10, dtype=dtype)
        expected = buffer.clone().flatten()
        inside = make(torch.arange(80).view(8, 10)).unique()
        changed = expected[inside]
        expected[inside] = changed * 0.5 if verb == "scale_" else changed.clamp(-0.5, 0.5)
        getattr(engine, verb)([make(buffer)], vector(0.5))
        assert torch.equal(bits(buffer), bits(expected.view(8, 10)))


# Clamping


def test_clamping_limits_every_element(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for bound in (0.5, 0.1, 0.0):
        expected = tensor.clone().clamp(-bound, bound)
        engine.clamp_([tensor], vector(bound))
        assert torch.equal(tensor, expected)


def test_one_bound_serves_all_or_each_has_its_own(engine: Engine, rewritten, dtype):
    tensors = [torch.tensor([-3.0, 0.25, 2.0], dtype=dtype) for _ in range(3)]
    fitting = torch.tensor([-2.5, 0.25], dtype=dtype)
    engine.clamp_([*tensors, fitting], vector(2.5))
    assert [tensor.tolist() for tensor in tensors] == [[-2.5, 0.25, 2.0]] * 3
    assert not rewritten(fitting, 0)
    versions = [tensor._version for tensor in tensors]
    rewritten.forget()
    engine.clamp_(tensors, vector(1.0, 4.0, 0.125))
    assert tensors[0].tolist() == [-1.0, 0.25, 1.0]
    assert tensors[1].tolist() == [-2.5, 0.25, 2.0]
    assert tensors[2].tolist() == [-0.125, 0.125, 0.125]
    assert not rewritten(tensors[1], versions[1])


def test_an_infinite_bound_leaves_everything(engine: Engine, rewritten, dtype):
    tensor = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=dtype)
    before, version = bits(tensor), tensor._version
    engine.clamp_([tensor], vector(math.inf))
    assert torch.equal(bits(tensor), before)
    assert not rewritten(tensor, version)


@pytest.mark.parametrize("size", [4, SMALL + 4])
def test_nan_stays_and_hides_no_larger_element(engine: Engine, dtype, size):
    tensor = torch.zeros(size, dtype=dtype)
    tensor[0], tensor[1], tensor[2] = math.nan, 3.0, -math.inf
    other = torch.tensor([2.0, 0.5], dtype=dtype)
    engine.clamp_([tensor, other], vector(1.0))
    assert math.isnan(tensor[0])
    assert tensor[1:3].tolist() == [1.0, -1.0]
    assert other.tolist() == [1.0, 0.5]


def test_tensors_that_fit_are_not_written(engine: Engine, rewritten, layout, dtype):
    """Beside a NaN, and at a bound that no binary dtype holds exactly, as well."""
    for tensor, bound in (
        (layout(dtype), 100.0),
        (torch.tensor([math.nan, 1.0], dtype=dtype), 1.0),
        (torch.tensor([1.0, -1.0], dtype=dtype), 0.1),
    ):
        if bound == 0.1:
            engine.clamp_([tensor], vector(bound))
        version = tensor._version
        rewritten.forget()
        engine.clamp_([tensor], vector(bound))
        assert not rewritten(tensor, version)


def test_a_bound_beyond_the_dtype_limits_infinity_to_its_largest_number(engine: Engine):
    for dtype, bound in ((torch.float16, 1e5), (torch.float32, 1e39), (torch.bfloat16, 1e39)):
        tensor = torch.tensor([-math.inf, 1.0, math.inf], dtype=dtype)
        engine.clamp_([tensor], vector(bound))
        largest = torch.finfo(dtype).max
        assert tensor.tolist() == [-largest, 1.0, largest]
