"""What every engine promises, run for each of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gradclip.engines.base import Engine
from gradclip.engines.operators.host_sums import ROW

ORDERS = [1.0, 2.0, math.inf, 0.5, 3.0]
# The limits inside the operators engine, as conftest.py lowers them.
SMALL = 600
CHUNK = 8 * ROW
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a strided tensor that compares equal only to the same bits."""
    return tensor.contiguous().view(INTEGERS[tensor.element_size()]).clone()


def storage_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all bytes of the buffer that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


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
    "whole rows": lambda dtype: random(5, ROW, dtype=dtype),
    "rows and a rest": lambda dtype: random(SMALL + 5 * ROW - 1, dtype=dtype),
    "one chunk": lambda dtype: random(CHUNK, dtype=dtype),
    "chunks and a rest": lambda dtype: random(2 * CHUNK + ROW + 3, dtype=dtype),
    "transposed": lambda dtype: random(30, 20, dtype=dtype).t(),
    "large transposed": lambda dtype: random(50, 60, dtype=dtype).t(),
    "channels last": lambda dtype: random(4, 3, 5, 5, dtype=dtype).to(
        memory_format=torch.channels_last
    ),
    "large channels last": lambda dtype: random(8, 16, 5, 5, dtype=dtype).to(
        memory_format=torch.channels_last
    ),
    "sliced": lambda dtype: random(20, 30, dtype=dtype)[3:17, 5:-4:2],
    "large sliced": lambda dtype: random(100, 50, dtype=dtype)[1:, ::2],
    "expanded": lambda dtype: random(7, 1, dtype=dtype).expand(7, 9),
    "large expanded": lambda dtype: random(1, dtype=dtype).expand(SMALL + 9),
    "overlapping": lambda dtype: windows(random(40, dtype=dtype), 9, 5, 3),
    "large overlapping": lambda dtype: windows(random(3000, dtype=dtype), 60, 80, 40),
    "misaligned": lambda dtype: random(41, dtype=dtype)[1:],
    "large misaligned": lambda dtype: random(SMALL + 3 * ROW + 7, dtype=dtype)[3:],
    "unusual strides": lambda dtype: random(8, dtype=dtype).as_strided((2, 3), (3, 2)),
}
REPEATING = {"expanded", "large expanded", "overlapping", "large overlapping"}


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def layout(request):
    return request.param


def expected_power_sum(tensor: torch.Tensor, order: float) -> float:
    values = tensor.double().abs().flatten()
    if not values.numel():
        return 0.0
    return (values.max() if order == math.inf else (values**order).sum()).item()


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# power_sums


def test_power_sums_are_those_of_float64(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for order in ORDERS:
        sums = engine.power_sums([tensor], order)
        assert sums.shape == (1,)
        assert sums.dtype == torch.float64
        assert sums.item() == pytest.approx(expected_power_sum(tensor, order), rel=1e-6, abs=0)


def test_the_norm_is_that_of_float64(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for order in ORDERS:
        norm = engine.norm([tensor], order)
        assert norm.shape == (1,)
        assert norm.dtype == torch.float64
        expected = expected_power_sum(tensor, order)
        expected = expected if order == math.inf else expected ** (1 / order)
        assert norm.item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_each_tensor_has_its_own_sum_and_all_share_a_norm(engine: Engine, dtype):
    tensors = [make(dtype) for make in LAYOUTS.values()]
    for order in ORDERS:
        expected = [expected_power_sum(tensor, order) for tensor in tensors]
        sums = engine.power_sums(tensors, order)
        assert sums.tolist() == pytest.approx(expected, rel=1e-6, abs=0)
        norm = engine.norm(tensors, order)
        total = max(expected) if order == math.inf else math.fsum(expected) ** (1 / order)
        assert norm.shape == (1,)
        assert norm.item() == pytest.approx(total, rel=1e-6, abs=0)


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
    one = 1 if order == math.inf else size
    sums = engine.power_sums(tensors, order).tolist()
    assert sums[0] == pytest.approx(one, rel=1e-6)
    assert math.isnan(sums[1])
    assert sums[2] == math.inf
    assert math.isnan(sums[3])
    assert engine.norm(tensors[::2], order).item() == math.inf
    assert math.isnan(engine.norm(tensors[:2], order).item())


def test_measuring_leaves_every_bit_as_it_is(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    before, version = storage_bits(tensor), tensor._version
    for order in ORDERS:
        engine.power_sums([tensor, tensor[...]], order)
        engine.norm([tensor, tensor[...]], order)
    assert torch.equal(storage_bits(tensor), before)
    assert tensor._version == version


def test_the_same_gradients_give_the_same_bits(engine: Engine, dtype):
    tensors = [make(dtype) for make in LAYOUTS.values()]
    copies = [tensor.clone() for tensor in tensors]
    for order, measure in itertools.product(ORDERS, (engine.power_sums, engine.norm)):
        assert torch.equal(measure(tensors, order), measure(copies, order))


# scale_


def assert_scaled(found: torch.Tensor, tensor: torch.Tensor, coefficient: float) -> None:
    """One rounding of the product, and one of the coefficient to float32."""
    expected = tensor.double() * coefficient
    info = torch.finfo(tensor.dtype)
    tolerance = (info.eps / 2 + 2.0**-24) * expected.abs() + info.smallest_normal * info.eps
    assert bool(((found.double() - expected).abs() <= tolerance).all())


def test_scaling_multiplies_every_place_once(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for coefficient in (0.3, 0.999, 1e-5):
        original = tensor.clone()
        engine.scale_([tensor], vector(coefficient))
        assert_scaled(tensor, original, coefficient)


def test_scaling_takes_one_coefficient_for_all_or_one_for_each(engine: Engine, dtype):
    makers = list(LAYOUTS.values())
    tensors = [make(dtype) for make in makers]
    originals = [tensor.clone() for tensor in tensors]
    engine.scale_(tensors, vector(0.25))
    for tensor, original in zip(tensors, originals, strict=True):
        assert_scaled(tensor, original, 0.25)
    each = [0.1 * (index % 10) + 0.05 for index in range(len(makers))]
    originals = [tensor.clone() for tensor in tensors]
    engine.scale_(tensors, vector(*each))
    for tensor, original, coefficient in zip(tensors, originals, each, strict=True):
        assert_scaled(tensor, original, coefficient)


def test_a_coefficient_that_rounds_to_one_writes_nothing(engine: Engine, rewritten, layout, dtype):
    tensor = layout(dtype)
    if tensor.numel() and tensor.dim():
        tensor[(0,) * tensor.dim()] = math.nan
    before, version = storage_bits(tensor), tensor._version
    narrow = dtype is not torch.float64
    for coefficient in [1.0] + [1 - 2.0**-25, 1 - 2.0**-30] * narrow:
        engine.scale_([tensor], vector(coefficient))
        engine.scale_([tensor, tensor], vector(coefficient, coefficient))
    assert not rewritten(tensor, version)
    assert torch.equal(storage_bits(tensor), before)


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
        flat = tensor.as_strided((1,), (1,))
        flat[0] = math.nan
        if tensor.numel() > 1:
            tensor[(-1,) * tensor.dim()] = -math.inf
    engine.scale_([tensor], vector(0.0))
    assert not bool((tensor != 0).any())


def test_scaling_a_view_leaves_what_surrounds_it(engine: Engine, dtype):
    for make in (
        lambda buffer: buffer[2:5, 3:7],
        lambda buffer: buffer[:, ::2],
        lambda buffer: buffer[1:2].expand(6, 10),
        lambda buffer: buffer.as_strided((3, 4), (2, 2), 5),
        lambda buffer: buffer.as_strided((2, 3), (12, 1), 7),
    ):
        buffer = random(8, 10, dtype=dtype)
        expected = buffer.clone().flatten()
        expected[make(torch.arange(80).view(8, 10)).unique()] *= 0.5
        engine.scale_([make(buffer)], vector(0.5))
        assert torch.equal(bits(buffer), bits(expected.view(8, 10)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_coefficient_below_the_normal_float32_numbers_keeps_its_value(engine: Engine, dtype):
    for coefficient in (1e-38, 3e-40, 1e-45, 1e-60, 1e-74):
        tensor = torch.full((5,), 3e38, dtype=dtype)
        tensor[1] = -tensor[0]
        original = tensor.clone()
        engine.scale_([tensor], vector(coefficient))
        assert_scaled(tensor, original, coefficient)
        assert bool((tensor != 0).all())


# clamp_


def test_clamping_limits_every_element(engine: Engine, layout, dtype):
    tensor = layout(dtype)
    for bound in (0.5, 0.1, 0.0):
        expected = tensor.clone().clamp(-bound, bound)
        engine.clamp_([tensor], vector(bound))
        assert torch.equal(tensor, expected)


def test_clamping_takes_one_bound_for_all_or_one_for_each(engine: Engine, rewritten, dtype):
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


def test_what_fits_beside_a_nan_is_not_written(engine: Engine, rewritten, dtype):
    tensor = torch.tensor([math.nan, 1.0], dtype=dtype)
    version = tensor._version
    engine.clamp_([tensor], vector(1.0))
    assert not rewritten(tensor, version)


def test_what_fits_is_not_written(engine: Engine, rewritten, layout, dtype):
    tensor = layout(dtype)
    version = tensor._version
    engine.clamp_([tensor], vector(100.0))
    assert not rewritten(tensor, version)


def test_a_clamped_tensor_fits_the_bound_it_was_clamped_to(engine: Engine, rewritten, dtype):
    tensor = torch.tensor([1.0, -1.0], dtype=dtype)
    engine.clamp_([tensor], vector(0.1))  # which no binary dtype holds exactly
    version = tensor._version
    rewritten.forget()
    engine.clamp_([tensor], vector(0.1))
    assert not rewritten(tensor, version)


def test_a_bound_beyond_the_dtype_limits_infinity_to_its_largest_number(engine: Engine):
    for dtype, bound in ((torch.float16, 1e5), (torch.float32, 1e39), (torch.bfloat16, 1e39)):
        tensor = torch.tensor([-math.inf, 1.0, math.inf], dtype=dtype)
        engine.clamp_([tensor], vector(bound))
        largest = torch.finfo(dtype).max
        assert tensor.tolist() == [-largest, 1.0, largest]


def test_clamping_a_view_leaves_what_surrounds_it(engine: Engine, dtype):
    buffer = torch.full((6, 8), 5.0, dtype=dtype)
    engine.clamp_([buffer[1:3, ::2]], vector(1.0))
    expected = torch.full((6, 8), 5.0, dtype=dtype)
    expected[1:3, ::2] = 1.0
    assert torch.equal(buffer, expected)
