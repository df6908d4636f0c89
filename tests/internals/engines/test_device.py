"""The operators engine off the CPU: as the reference, and where reading a value would raise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip.engines import engine_for
from gradclip.engines.operators import device
from tests.support.engines import ORDERS, random, vector

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
rows = pytest.mark.parametrize("rows", [False, True], ids=["tensors", "rows"])


pytestmark = pytest.mark.usefixtures("without_graph")


def gradients_for(dtype: torch.dtype, rows: bool) -> list[torch.Tensor]:
    shared = [
        random(30, 7, dtype=dtype),
        torch.empty(0, 3, dtype=dtype),
        random(12, 20, dtype=dtype)[2:9, ::3],
        random(6, 5, dtype=dtype).t(),
        random(4, 1, dtype=dtype).expand(4, 9),
    ]
    if not rows:
        windows = random(11, dtype=dtype).as_strided((4, 5), (2, 1))
        return [*shared, torch.tensor(-2.5, dtype=dtype), windows]
    return [
        *shared,
        random(5, dtype=dtype),
        torch.empty(3, 0, dtype=dtype),
        random(4, 3, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last),
        torch._neg_view(random(3, 5, dtype=dtype)),
        random(50, dtype=dtype).as_strided((4, 3, 5), (12, 2, 1)),
    ]


@rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
def test_it_measures_as_the_reference(dtype, order, rows):
    given = gradients_for(dtype, rows)
    found, needed = (
        device.power_sums(given, order, rows=rows),
        REFERENCE.power_sums(given, order, rows=rows),
    )
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, needed, rtol=1e-12, atol=0)
    norm = device.norm(given, order)
    torch.testing.assert_close(norm, REFERENCE.norm(given, order), rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [2.0, math.inf])
def test_empty_tensors_alone_have_the_norm_zero(order):
    empty = [torch.empty(0), torch.empty(3, 0)]
    assert device.power_sums(empty, order, rows=False).tolist() == [0.0, 0.0]
    assert device.norm(empty, order).tolist() == [0.0]


NUMBERS = {
    "scale_": [[1.0], [0.3], [1e-5], [1e-40], [0.0], [1.0, 0.3, 1e-5, 0.0, 0.7]],
    "clamp_": [[0.5], [0.1], [0.0], [1e5], [math.inf], [0.5, math.inf, 0.1, 1e-9, 1e5]],
}


@rows
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("verb", "numbers"), [(verb, numbers) for verb in NUMBERS for numbers in NUMBERS[verb]]
)
def test_it_writes_as_the_reference(dtype, verb, numbers, rows):
    """One number for all or one each, over NaN, infinity and the largest elements."""
    given = gradients_for(dtype, rows)
    given[0][0, 0] = torch.finfo(dtype).max / 2
    if verb == "clamp_" or numbers[0] in (0, 1):
        given[0][3, :3] = torch.tensor([math.nan, -math.inf, math.inf])
    needed = [tensor.clone() for tensor in given]
    count = sum(map(len, given)) if rows else len(given)
    if len(numbers) > 1:
        numbers = itertools.islice(itertools.cycle(numbers), count)
    each = vector(*numbers)
    getattr(REFERENCE, verb)(needed, each, rows=rows)
    getattr(device, verb)(given, each, rows=rows)
    for one, other in zip(given, needed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_off_the_cpu_no_value_is_read(kind, order):
    """A fake tensor has no values: reading one would raise."""
    with FakeTensorMode():
        given = [torch.empty(size, device=kind) for size in [(50, 3), (), (0,), (9000,)]]
        given.append(torch.empty(1, device=kind).expand(7))
        norm = gradclip.clip_gradients_(given, 1.0, order)
        assert (norm.device.type, norm.dtype, norm.shape) == (kind, torch.float64, ())
        ENGINE.clamp_(given, torch.ones(1, device=kind))
        ENGINE.scale_(given, torch.ones(len(given), device=kind))
        given = [torch.empty(size, device=kind) for size in [(50, 3), (7,), (0, 2), (9, 2, 2)]]
        given.append(torch.empty(3, 1, device=kind).expand(3, 7))
        numbers = torch.ones(69, device=kind, dtype=torch.float64)
        sums = ENGINE.power_sums(given, order, rows=True)
        assert (sums.device.type, sums.dtype, sums.shape) == (kind, torch.float64, (69,))
        ENGINE.clamp_(given, numbers, rows=True)
        ENGINE.scale_(given, numbers, rows=True)


def test_off_the_cpu_overlapping_windows_read_no_value_either():
    given = torch.empty(100, device="meta").as_strided((9, 20), (10, 1))
    ENGINE.scale_([given], torch.ones(1, device="meta"))
    given = torch.empty(100, device="meta").as_strided((4, 3, 5), (12, 2, 1))
    ENGINE.scale_([given], torch.ones(4, device="meta"), rows=True)
