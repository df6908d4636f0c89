"""The operators engine on the CPU: what it computes again in float64, and what it leaves alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradclip
from gradclip.engines import engine_for
from gradclip.engines.operators import host
from gradclip.engines.operators.host import PIECE, SMALL, piece_norms
from tests.support.engines import denormals_flushed, vector

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))
NARROW = [torch.float32, torch.bfloat16]
UNLIKE = [0.0, 1e20, 1.0, 3e38, 1e-25, -1e-39, 1e-30, -0.0, 1e-44, 0.5]
"""Magnitudes that float32 holds and whose squares it does not."""


pytestmark = pytest.mark.usefixtures("without_graph")


@pytest.fixture
def exact_shapes(monkeypatch):
    """The shapes that were summed in float64 from the first element on."""
    shapes, row_sums = [], host._row_sums

    def watched(matrix, order, *, exact):
        shapes.extend([tuple(matrix.shape)] if exact else [])
        return row_sums(matrix, order, exact=exact)

    monkeypatch.setattr(host, "_row_sums", watched)
    return shapes


# Accuracy


def worst_error_of_a_piece(count: int) -> float:
    """The largest relative error among pieces of one constant each, over all mantissas."""
    constants = 1 + 3 * torch.rand(count, generator=torch.Generator().manual_seed(0))
    rows = constants.repeat_interleave(PIECE).view(count, PIECE)
    errors = [
        (piece_norms(some, order)[:, 0].double() / some[:, 0].double() / scale - 1).abs()
        for some in rows.split(100)
        for order, scale in ((1.0, PIECE), (2.0, math.sqrt(PIECE)))
    ]
    return torch.cat(errors).max().item()


def test_constant_pieces_keep_the_accuracy():
    """Rounding errors of equal elements add up instead of cancelling."""
    assert worst_error_of_a_piece(50_000) < 5e-7


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_vector_units_keep_the_accuracy(capability):
    code = (
        "from tests.internals.engines.test_host import worst_error_of_a_piece\n"
        "error = worst_error_of_a_piece(20_000)\n"
        "assert error < 5e-7, error\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, check=True, timeout=120)


# What is summed again


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float16], ids=str)
def test_zeros_are_not_summed_again(exact_shapes, dtype, order):
    """Idle experts and unused rows of an embedding are all zero: common, and quickly done."""
    table = torch.zeros(1000, 300, dtype=dtype)
    table[::20] = 0.5
    sums = ENGINE.power_sums([table, torch.zeros(9000, dtype=dtype)], order, rows=True)
    needed = REFERENCE.power_sums([table], order, rows=True)
    torch.testing.assert_close(sums[:1000], needed, rtol=1e-6, atol=0)
    assert not bool(sums[1000:].any())
    for given in ([torch.zeros(SMALL + 1), torch.zeros(3), torch.empty(0)], [torch.ones(9000)]):
        total = ENGINE.norm(given, order).item()
        assert total == pytest.approx(REFERENCE.norm(given, order).item(), rel=1e-6)
    assert not exact_shapes


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_only_sums_out_of_range_are_computed_again(exact_shapes, dtype):
    table = torch.ones(1000, 300, dtype=dtype)
    table[3, 5], table[500], table[999, 7] = 1e20, 1e-25, math.inf
    given = [torch.ones(50, 200, dtype=dtype), table]
    found, needed = (one.power_sums(given, 2.0, rows=True) for one in (ENGINE, REFERENCE))
    torch.testing.assert_close(found, needed, rtol=1e-6, atol=0)
    assert exact_shapes == [(3, 300)]
    exact_shapes.clear()
    given = [torch.ones(9000), torch.full((10000,), 1e-25), torch.zeros(9000), torch.ones(4)]
    given = [tensor.to(dtype) for tensor in given]
    found, needed = (one.power_sums(given, 2.0) for one in (ENGINE, REFERENCE))
    torch.testing.assert_close(found, needed, rtol=1e-6, atol=0)
    assert exact_shapes == [(1, 10000)]


def test_norms_in_range_and_nan_are_computed_once(exact_shapes):
    given = [torch.randn(SMALL + PIECE), torch.full((9,), 1e-3), torch.zeros(2)]
    for order in (1.0, 2.0, math.inf):
        ENGINE.norm(given, order)
    ENGINE.norm([*given[:2], torch.tensor([math.nan])], 2.0)
    ENGINE.power_sums([given[0], torch.tensor([math.nan])], 2.0)
    assert not exact_shapes


# Denormals where they are flushed


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 0.25])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("width", [1, 7, 300, 1024])
@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_flushed_denormals_count_in_rows(dtype, width, order, small):
    rows = len(UNLIKE) if small else 10_000 // width + 1
    table = torch.tensor(UNLIKE, dtype=dtype).repeat(rows)[:rows].unsqueeze(1).repeat(1, width)
    needed = REFERENCE.power_sums([table], order, rows=True).tolist()
    with denormals_flushed():
        found = ENGINE.power_sums([table], order, rows=True).tolist()
    assert found == pytest.approx(needed, rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [5, SMALL + 1])
@pytest.mark.parametrize("order", [0.1, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", ["beside larger ones", "beside zeros", "negated"])
def test_flushed_denormals_count_in_tensors(size, order, kind):
    given = torch.zeros(size)
    given[1], given[3] = -1e-39, 2e-39
    if kind == "beside larger ones":
        given[0] = 0.5
    elif kind == "negated":
        given = torch._neg_view(given)
    needed = REFERENCE.power_sums([given], order).item()
    with denormals_flushed():
        found = ENGINE.power_sums([given], order).item()
        norm = ENGINE.norm([given], order).item()
    assert found == pytest.approx(needed, rel=1e-6, abs=0)
    assert norm == pytest.approx(REFERENCE.norm([given], order).item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float16], ids=str)
def test_all_magnitudes_are_widened(dtype, flush):
    """Every half, and every float32 with 16 bits, whether the CPU flushes denormals or not."""
    integers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    shifted = integers << 16 if dtype is torch.float32 else integers.to(torch.int16)
    values = shifted.view(dtype)
    with denormals_flushed(flush):
        assert host.flushes_denormals() == flush
        found = host.widened(values)
    needed = values.double().abs()
    assert torch.equal(found[~needed.isnan()], needed[~needed.isnan()])
    assert bool(found[needed.isnan()].isnan().all())


# Bits, memory and calls


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(dtype, order):
    given = [torch.randn(shape).to(dtype) for shape in ((5, 3), (30, 5000), (3, 90_000))]
    copies, threads = [tensor.clone() for tensor in given], torch.get_num_threads()
    for rows in (False, True):
        first = ENGINE.power_sums(given, order, rows=rows)
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(ENGINE.power_sums(copies, order, rows=rows), first)
        finally:
            torch.set_num_threads(threads)
    ENGINE.norm(given, order)
    assert all(map(torch.equal, given, copies))  # float64 ones included, which are not converted


def test_lazily_negated_elements_are_measured_and_written_where_they_lie():
    base = torch.randn(SMALL + 5, dtype=torch.complex64)
    view = base.conj().imag
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


@pytest.mark.parametrize("verb", ["scale_", "clamp_"])
def test_where_nothing_changes_no_tensor_is_looked_at(monkeypatch, verb):
    def refused(*_):
        raise AssertionError("a tensor was looked at")

    for name in ("_change_rows_", "stored_once", "writable"):
        monkeypatch.setattr(host, name, refused)
    given = [torch.full((3, 4), 0.5), torch.full((9000,), 0.5)]
    for rows, count in ((True, 9003), (False, 2), (False, 1)):
        getattr(ENGINE, verb)(given, torch.ones(count, dtype=torch.float64), rows=rows)


def test_many_tensors_are_multiplied_in_one_call(monkeypatch):
    calls, multiply = [], torch._foreach_mul_

    def counted(memories, factors):
        calls.append(len(memories))
        return multiply(memories, factors)

    monkeypatch.setattr(torch, "_foreach_mul_", counted)
    given = [torch.ones(5) for _ in range(40)]
    ENGINE.scale_(given, torch.full((40,), 0.5, dtype=torch.float64))
    ENGINE.scale_(given, vector(0.5))
    assert calls == [40, 40]
    assert all(tensor.tolist() == [0.25] * 5 for tensor in given)


def test_a_nan_coefficient_is_not_taken_for_one():
    for rows, count in ((True, 6), (False, 2), (False, 1)):
        given = [torch.ones(3), torch.ones(3)]
        numbers = torch.ones(count, dtype=torch.float64)
        numbers[0] = math.nan
        ENGINE.scale_(given, numbers, rows=rows)
        assert math.isnan(given[0][0])


def test_a_compiled_function_clips_as_another():
    given = [torch.randn(SMALL + 3), torch.randn(5)]
    norm = REFERENCE.norm(given, 2.0).item()
    compiled = torch.compile(gradclip.clip_gradients_, backend="eager")
    assert compiled(given, 1.0).item() == pytest.approx(norm, rel=1e-6)
    assert REFERENCE.norm(given, 2.0).item() == pytest.approx(1.0, rel=1e-6)
