"""The way of other devices, run on the CPU against the reference and where there are no values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip.engines import engine_for
from gradclip.engines.operators import device

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_graph():
    with torch.no_grad():
        yield


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    buffer = torch.randn(12, 20).to(dtype)
    return [
        torch.randn(30, 7).to(dtype),
        torch.tensor(-2.5, dtype=dtype),
        torch.empty(0, dtype=dtype),
        buffer[2:9, ::3],
        torch.randn(6, 5).to(dtype).t(),
        torch.randn(4, 1).to(dtype).expand(4, 9),
        torch.randn(11).to(dtype).as_strided((4, 5), (2, 1)),
    ]


def row_gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    images = torch.randn(4, 3, 2, 2).to(dtype)
    return [
        torch.randn(30, 7).to(dtype),
        torch.randn(5).to(dtype),
        torch.empty(0, 3, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
        images.contiguous(memory_format=torch.channels_last),
        torch.randn(12, 20).to(dtype)[2:9, ::3],
        torch.randn(6, 5).to(dtype).t(),
        torch._neg_view(torch.randn(3, 5).to(dtype)),
        torch.randn(4, 1).to(dtype).expand(4, 9),
        torch.randn(50).to(dtype).as_strided((4, 3, 5), (12, 2, 1)),
    ]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 0.5, 3.0])
def test_the_way_of_other_devices_measures_the_same(dtype, order):
    given = gradients(dtype)
    for found, needed in [
        (device.power_sums(given, order, rows=False), REFERENCE.power_sums(given, order)),
        (device.norm(given, order), REFERENCE.norm(given, order)),
    ]:
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, needed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_the_way_of_other_devices_takes_empty_tensors_alone(order):
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert device.power_sums(empty, order, rows=False).tolist() == [0.0, 0.0]
    assert device.norm(empty, order).tolist() == [0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [1.0, 0.3, 1e-5, 1e-40, 0.0])
def test_the_way_of_other_devices_scales_the_same(dtype, coefficient):
    given = gradients(dtype)
    given[0][0, 0] = 3e38 if dtype is not torch.float16 else 6e4
    if coefficient in (0, 1):
        given[0][1, 0], given[0][2, 0] = math.nan, -math.inf
    needed = [tensor.clone() for tensor in given]
    REFERENCE.scale_(needed, vector(coefficient))
    device.scale_(given, vector(coefficient), rows=False)
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.5, 0.1, 0.0, 1e5, math.inf])
def test_the_way_of_other_devices_limits_the_same(dtype, bound):
    given = gradients(dtype)
    given[0][:3, 0] = torch.tensor([math.nan, -math.inf, math.inf])
    needed = [tensor.clone() for tensor in given]
    REFERENCE.clamp_(needed, vector(bound))
    device.clamp_(given, vector(bound), rows=False)
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_way_of_other_devices_takes_one_number_for_each():
    given = [torch.tensor([4.0, -8.0]) for _ in range(3)]
    device.scale_(given, vector(0.5, 1.0, 0.0), rows=False)
    assert [tensor.tolist() for tensor in given] == [[2.0, -4.0], [4.0, -8.0], [0.0, 0.0]]
    device.clamp_(given, vector(1.0, 5.0, 1.0), rows=False)
    assert [tensor.tolist() for tensor in given] == [[1.0, -1.0], [4.0, -5.0], [0.0, 0.0]]


@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_off_the_cpu_no_value_is_read(kind, order):
    # A fake tensor has no values: whatever read one would raise.
    with FakeTensorMode():
        given = [torch.empty(size, device=kind) for size in [(50, 3), (), (0,), (9000,)]]
        given.append(torch.empty(1, device=kind).expand(7))
        norm = gradclip.clip_gradients_(given, 1.0, order)
        assert (norm.device.type, norm.dtype, norm.shape) == (kind, torch.float64, ())
        ENGINE.clamp_(given, torch.ones(1, device=kind))
        ENGINE.scale_(given, torch.ones(len(given), device=kind))


def test_off_the_cpu_overlapping_windows_read_no_value_either():
    given = torch.empty(100, device="meta").as_strided((9, 20), (10, 1))
    ENGINE.scale_([given], torch.ones(1, device="meta"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 0.5, 3.0])
def test_the_way_of_other_devices_measures_rows_the_same(dtype, order):
    given = row_gradients(dtype)
    found = device.power_sums(given, order, rows=True)
    needed = REFERENCE.power_sums(given, order, rows=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, needed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("verb", ["scale_", "clamp_"])
def test_the_way_of_other_devices_writes_rows_the_same(dtype, verb):
    given = row_gradients(dtype)
    given[0][3, :3] = torch.tensor([math.nan, -math.inf, math.inf])
    needed = [tensor.clone() for tensor in given]
    numbers = [1.0, 0.3, 1e-5, 0.0, 0.7] if verb == "scale_" else [0.5, math.inf, 0.1, 1e-9, 1e5]
    count = sum(map(len, given))
    each = vector(*itertools.islice(itertools.cycle(numbers), count))
    getattr(REFERENCE, verb)(needed, each, rows=True)
    getattr(device, verb)(given, each, rows=True)
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["cuda", "meta"])
def test_off_the_cpu_no_value_of_a_row_is_read(kind):
    with FakeTensorMode():
        given = [torch.empty(size, device=kind) for size in [(50, 3), (7,), (0, 2), (9, 2, 2)]]
        given.append(torch.empty(3, 1, device=kind).expand(3, 7))
        numbers = torch.ones(69, device=kind, dtype=torch.float64)
        sums = ENGINE.power_sums(given, 2.0, rows=True)
        assert (sums.device.type, sums.dtype, sums.shape) == (kind, torch.float64, (69,))
        ENGINE.clamp_(given, numbers, rows=True)
        ENGINE.scale_(given, numbers, rows=True)


def test_windows_within_rows_read_no_value_either():
    given = torch.empty(100, device="meta").as_strided((4, 3, 5), (12, 2, 1))
    ENGINE.scale_([given], torch.ones(4, device="meta"), rows=True)
