from __future__ import annotations

import math

import pytest
import torch

from gradclip.engines.bits import are_filled, flushes_denormals, magnitude_bits, widened

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[False, True], ids=["denormals", "flushed"])
def flush(request):
    if request.param and not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    yield request.param
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_order_as_magnitudes_do_and_nan_is_the_largest(dtype):
    info = torch.finfo(dtype)
    rising = [0.0, info.smallest_normal * info.eps, info.smallest_normal, 1.0, info.max, math.inf]
    values = torch.tensor(rising, dtype=dtype)
    for signed in (values, -values):
        found = magnitude_bits(signed).tolist()
        assert found == sorted(set(found))
    assert magnitude_bits(torch.tensor([math.nan, -math.nan], dtype=dtype)).min() > found[-1]
    assert torch.equal(magnitude_bits(-values).view(dtype), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_filled_that_hold_the_smallest_number_there_is(dtype, flush):
    info = torch.finfo(dtype)
    table = torch.zeros(4, 5, dtype=dtype)
    table.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])[1, 4] = 1
    table[2, 0], table[3, 2] = math.nan, -info.max
    assert are_filled(table).tolist() == [False, True, True, True]
    assert are_filled(table[:, :4]).tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_magnitudes_are_read_whether_denormals_are_flushed_or_not(dtype, flush):
    info = torch.finfo(dtype)
    integers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    if dtype is torch.float32:
        values = (integers << 16).view(dtype)
    else:
        values = integers.to(torch.int16).view(dtype)
    assert flushes_denormals() == flush
    found = widened(values)
    torch.set_flush_denormal(False)
    needed = values.double().abs()
    assert int(((needed > 0) & (needed < info.smallest_normal)).sum()) > 100
    assert torch.equal(found[~needed.isnan()], needed[~needed.isnan()])
    assert bool(found[needed.isnan()].isnan().all())
