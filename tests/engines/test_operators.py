"""What is special to the engine of torch operators: its way off the CPU, and its corners on it."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip.engines import engine_for, operators
from gradclip.engines.operators import (
    ROW,
    SMALL,
    _device_clamp_,
    _device_norm,
    _device_power_sums,
    _device_scale_,
)

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


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Off the CPU


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 0.5, 3.0])
def test_the_way_of_other_devices_measures_the_same(dtype, order):
    given = gradients(dtype)
    for found, needed in [
        (_device_power_sums(given, order), REFERENCE.power_sums(given, order)),
        (_device_norm(given, order), REFERENCE.norm(given, order)),
    ]:
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, needed, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_the_way_of_other_devices_takes_empty_tensors_alone(order):
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert _device_power_sums(empty, order).tolist() == [0.0, 0.0]
    assert _device_norm(empty, order).tolist() == [0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficient", [1.0, 0.3, 1e-5, 1e-40, 0.0])
def test_the_way_of_other_devices_scales_the_same(dtype, coefficient):
    given = gradients(dtype)
    given[0][0, 0] = 3e38 if dtype is not torch.float16 else 6e4
    if coefficient in (0, 1):
        given[0][1, 0], given[0][2, 0] = math.nan, -math.inf
    needed = [tensor.clone() for tensor in given]
    REFERENCE.scale_(needed, vector(coefficient))
    _device_scale_(given, vector(coefficient))
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [0.5, 0.1, 0.0, 1e5, math.inf])
def test_the_way_of_other_devices_limits_the_same(dtype, bound):
    given = gradients(dtype)
    given[0][:3, 0] = torch.tensor([math.nan, -math.inf, math.inf])
    needed = [tensor.clone() for tensor in given]
    REFERENCE.clamp_(needed, vector(bound))
    _device_clamp_(given, vector(bound))
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_way_of_other_devices_takes_one_number_for_each():
    given = [torch.tensor([4.0, -8.0]) for _ in range(3)]
    _device_scale_(given, vector(0.5, 1.0, 0.0))
    assert [tensor.tolist() for tensor in given] == [[2.0, -4.0], [4.0, -8.0], [0.0, 0.0]]
    _device_clamp_(given, vector(1.0, 5.0, 1.0))
    assert [tensor.tolist() for tensor in given] == [[1.0, -1.0], [4.0, -5.0], [0.0, 0.0]]


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_off_the_cpu_no_value_is_read(device, order):
    # A fake tensor has no values: whatever read one would raise.
    with FakeTensorMode():
        given = [torch.empty(size, device=device) for size in [(50, 3), (), (0,), (9000,)]]
        given.append(torch.empty(1, device=device).expand(7))
        norm = gradclip.clip_gradients_(given, 1.0, order)
        assert (norm.device.type, norm.dtype, norm.shape) == (device, torch.float64, ())
        ENGINE.clamp_(given, torch.ones(1, device=device))
        ENGINE.scale_(given, torch.ones(len(given), device=device))


def test_off_the_cpu_overlapping_windows_read_no_value_either():
    given = torch.empty(100, device="meta").as_strided((9, 20), (10, 1))
    ENGINE.scale_([given], torch.ones(1, device="meta"))


# On the CPU


def test_lazily_negated_elements_are_measured_scaled_and_limited_where_they_lie():
    base = torch.randn(SMALL + 5, dtype=torch.complex64)
    view = base.conj().imag
    assert view.is_neg()
    needed = REFERENCE.power_sums([base.imag], 2.0).item()
    assert ENGINE.power_sums([view], 2.0).item() == pytest.approx(needed, rel=1e-6)
    expected = base.imag * 0.5
    for engine in (ENGINE, REFERENCE):
        copy = base.clone()
        engine.scale_([copy.conj().imag], vector(0.5))
        assert torch.equal(copy.imag, expected)
        assert torch.equal(copy.real, base.real)
        engine.clamp_([copy.conj().imag], vector(0.25))
        assert torch.equal(copy.imag, expected.clamp(-0.25, 0.25))


@pytest.mark.parametrize("amount", [0.5, 0.3])
def test_overlapping_tensors_among_others_are_scaled_once(amount):
    shared = torch.ones(1)
    given = [torch.ones(3), shared.expand(5), torch.ones(2, 2).t()]
    ENGINE.scale_(given, vector(amount))
    for tensor in given:
        assert tensor.unique().tolist() == pytest.approx([amount])


def test_what_is_in_range_is_summed_once(monkeypatch):
    given = [torch.randn(SMALL + ROW), torch.full((9,), 1e-3), torch.zeros(2)]

    def looked_again(*arguments, exact):
        assert not exact
        return condensed(*arguments, exact=exact)

    condensed = operators._condensed
    monkeypatch.setattr(operators, "_condensed", looked_again)
    for order in (1.0, 2.0, math.inf):
        ENGINE.norm(given, order)
    ENGINE.norm([*given[:2], torch.tensor([math.nan])], 2.0)
    ENGINE.power_sums([given[0], torch.tensor([math.nan])], 2.0)


def test_zeros_of_any_length_have_the_sum_zero():
    given = [torch.zeros(SMALL + 1), torch.zeros(3), torch.empty(0)]
    for order in (1.0, 2.0, 3.0, math.inf):
        assert ENGINE.power_sums(given, order).tolist() == [0.0, 0.0, 0.0]
        assert ENGINE.norm(given, order).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_denormals_beside_zeros_are_seen_where_they_are_flushed(dtype):
    given = [torch.zeros(SMALL + 1, dtype=dtype), torch.zeros(5, dtype=dtype)]
    for tensor in given:
        tensor[1], tensor[3] = -1e-39, 2e-39
    needed = REFERENCE.power_sums(given, math.inf).tolist()
    assert needed[0] > 0
    if not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        found = [ENGINE.power_sums(given, order).tolist() for order in (1.0, 2.0, math.inf)]
    finally:
        torch.set_flush_denormal(False)
    assert found[0] == pytest.approx([needed[0] * 1.5] * 2, rel=0.01, abs=0)
    assert found[1] == pytest.approx([needed[0] ** 2 * 1.25] * 2, rel=0.01, abs=0)
    assert found[2] == needed


def test_a_compiled_function_clips_as_another():
    given = [torch.randn(SMALL + 3), torch.randn(5)]
    norm = REFERENCE.norm(given, 2.0).item()
    compiled = torch.compile(gradclip.clip_gradients_, backend="eager")
    assert compiled(given, 1.0).item() == pytest.approx(norm, rel=1e-6)
    assert REFERENCE.norm(given, 2.0).item() == pytest.approx(1.0, rel=1e-6)
