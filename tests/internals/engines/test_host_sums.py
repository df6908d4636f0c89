"""What the way of the CPU does and leaves to keep sums both right and cheap."""

from __future__ import annotations

import math

import pytest
import torch

from gradclip.engines import engine_for
from gradclip.engines.operators import host_sums

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_graph():
    with torch.no_grad():
        yield


@pytest.fixture
def looked_again(monkeypatch):
    """The tables that were summed from the first element on in float64."""
    tables = []

    def watched(given, order, *, exact):
        tables.extend(given if exact else [])
        return row_sums(given, order, exact=exact)

    row_sums = host_sums._row_sums
    monkeypatch.setattr(host_sums, "_row_sums", watched)
    return tables


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_are_not_summed_again(looked_again, dtype, order):
    table = torch.zeros(1000, 300, dtype=dtype)
    table[::20] = 0.5
    sums = ENGINE.power_sums([table, torch.zeros(9000, dtype=dtype)], order, rows=True)
    needed = REFERENCE.power_sums([table], order, rows=True)
    torch.testing.assert_close(sums[:1000], needed, rtol=1e-6, atol=0)
    assert not bool(sums[1000:].any())
    ENGINE.power_sums([torch.zeros(100, 300, dtype=dtype), torch.zeros(3, dtype=dtype)], order)
    assert not looked_again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_rows_out_of_range_are_summed_again(looked_again, dtype):
    table = torch.ones(1000, 300, dtype=dtype)
    table[3, 5], table[500], table[999, 7] = 1e20, 1e-25, math.inf
    found = ENGINE.power_sums([torch.ones(50, 200, dtype=dtype), table], 2.0, rows=True)
    needed = REFERENCE.power_sums([torch.ones(50, 200, dtype=dtype), table], 2.0, rows=True)
    torch.testing.assert_close(found, needed, rtol=1e-6, atol=0)
    assert [len(rows) for rows in looked_again] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_out_of_range_among_others_is_summed_again_alone(looked_again, dtype):
    given = [torch.ones(9000), torch.full((10000,), 1e-25), torch.zeros(9000), torch.ones(4)]
    given = [tensor.to(dtype) for tensor in given]
    found = ENGINE.power_sums(given, 2.0)
    torch.testing.assert_close(found, REFERENCE.power_sums(given, 2.0), rtol=1e-6, atol=0)
    assert [rows.shape for rows in looked_again] == [(1, 10000)]


MAGNITUDES = [0.0, 1e20, 1.0, 3e38, 1e-25, -1e-39, 1e-30, -0.0, 1e-44, 0.5]


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 300, 1024])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_rows_of_denormals_are_seen_where_they_are_flushed(dtype, width, order, small):
    rows = len(MAGNITUDES) if small else 10_000 // width + 1
    table = torch.tensor(MAGNITUDES, dtype=dtype).repeat(rows)[:rows].unsqueeze(1).repeat(1, width)
    needed = REFERENCE.power_sums([table], order, rows=True)
    assert bool((needed[:4] > 0).any())
    if not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        found = ENGINE.power_sums([table], order, rows=True).tolist()
    finally:
        torch.set_flush_denormal(False)
    assert found == pytest.approx(needed.tolist(), rel=1e-6, abs=0)


def test_measuring_float64_writes_nothing_into_it():
    for given in ([torch.full((50,), -3.0)], [torch.full((9000,), -3.0)]):
        given = [tensor.double() for tensor in given]
        for order in (1.0, 2.0, 3.0, math.inf):
            ENGINE.power_sums(given, order)
            ENGINE.norm(given, order)
        assert bool((given[0] == -3).all())


@pytest.mark.parametrize("longest", [host_sums.ROW, host_sums.HALF_ROW])
@pytest.mark.parametrize("columns", [1, 7, 147, 256, 257, 509, 521, 576, 1000, 4608, 9001])
def test_pieces_are_short_and_many_shapes_leave_no_rest(columns, longest):
    width = host_sums._width(columns, longest)
    assert 1 <= width <= longest
    assert columns % width == 0 or columns in (147, 257, 509, 521, 9001)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, order):
    given = [torch.randn(shape).to(dtype) for shape in ((5, 3), (30, 5000), (3, 90_000))]
    threads = torch.get_num_threads()
    for rows in (False, True):
        first = ENGINE.power_sums(given, order, rows=rows)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                again = ENGINE.power_sums([tensor.clone() for tensor in given], order, rows=rows)
                assert torch.equal(again, first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [2, 9000])
def test_flushed_denormals_count_beside_larger_numbers_where_the_order_is_low(size):
    given = torch.full((size,), 1e-39)
    given[0] = 0.5
    needed = REFERENCE.power_sums([given], 0.1)
    if not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        found = ENGINE.power_sums([given], 0.1).item()
    finally:
        torch.set_flush_denormal(False)
    assert found == pytest.approx(needed.item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [4, 9000])
def test_lazily_negated_denormals_are_read_where_they_are_flushed(size):
    given = torch._neg_view(torch.full((size,), 1e-39))
    needed = REFERENCE.power_sums([given], 1.0)
    if not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        found = ENGINE.power_sums([given], 1.0).item()
    finally:
        torch.set_flush_denormal(False)
    assert found == pytest.approx(needed.item(), rel=1e-6, abs=0)
