"""What the way of the CPU leaves alone, and how it keeps tiny coefficients."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from gradclip.engines import engine_for
from gradclip.engines.operators import host_writing

ENGINE = engine_for("operators", torch.device("cpu"))


@pytest.fixture(autouse=True)
def without_graph():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("flushed", [False, True], ids=["denormals", "flushed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiny_row_coefficients_keep_their_value_where_denormals_are_flushed(dtype, flushed):
    each = torch.tensor([1e-38, 3e-40, 1.0, 1e-45, 0.5], dtype=torch.float64)
    tensor = torch.full((5, 400), -3e38).to(dtype)
    needed = tensor.double() * each.unsqueeze(1)
    if not torch.set_flush_denormal(flushed) and flushed:
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        ENGINE.scale_([tensor], each, rows=True)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(tensor.double(), needed, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("verb", ["scale_", "clamp_"])
def test_where_nothing_changes_no_tensor_is_looked_at_one_by_one(monkeypatch, verb):
    def refused(*_):
        raise AssertionError("a tensor was looked at")

    monkeypatch.setattr(host_writing, "_change_rows_", refused)
    monkeypatch.setattr(host_writing, "_change_tensors_", refused)
    given = [torch.full((3, 4), 0.5), torch.full((9000,), 0.5)]
    for rows, count in ((True, 9003), (False, 2), (False, 1)):
        numbers = torch.ones(count, dtype=torch.float64)
        getattr(ENGINE, verb)(given, numbers, rows=rows)


def test_rows_of_many_tensors_are_multiplied_in_one_call(monkeypatch):
    calls = []

    def counted(memories, factors):
        calls.append(len(memories))
        return multiply(memories, factors)

    multiply = torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", counted)
    given = [torch.ones(5) for _ in range(40)]
    ENGINE.scale_(given, torch.full((200,), 0.5, dtype=torch.float64), rows=True)
    ENGINE.scale_(given, torch.full((40,), 0.5, dtype=torch.float64))
    assert calls == [40, 40]
    assert all(tensor.tolist() == [0.25] * 5 for tensor in given)


def test_a_nan_coefficient_is_not_taken_for_one():
    for rows, count in ((True, 6), (False, 2), (False, 1)):
        given = [torch.ones(3), torch.ones(3)]
        numbers = torch.ones(count, dtype=torch.float64)
        numbers[0] = math.nan
        ENGINE.scale_(given, numbers, rows=rows)
        assert math.isnan(given[0][0])


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
