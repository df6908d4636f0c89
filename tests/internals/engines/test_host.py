"""The operators engine: what it computes again in float64, how often it writes, what it reads."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip.engines import engine_for
from gradclip.engines.operators import host
from gradclip.engines.operators.host import PIECE, SMALL
from tests.support.engines import vector

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("without_graph")

CONSTANT_PIECES = """
import math, torch
from gradclip.engines.operators.host import PIECE, piece_norms
constants = 1 + 3 * torch.rand(50_000, generator=torch.Generator().manual_seed(0))
for rows in constants.repeat_interleave(PIECE).view(-1, PIECE).split(100):
    for order, scale in ((1.0, PIECE), (2.0, math.sqrt(PIECE))):
        error = piece_norms(rows, order)[:, 0].double() / rows[:, 0].double() / scale - 1
        assert error.abs().max() < 5e-7, error.abs().max()
"""


@pytest.mark.parametrize(
    "capability",
    [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("default", "avx2"))],
)
def test_constant_pieces_keep_the_accuracy(capability):
    """Rounding errors of equal elements add up instead of cancelling, in vectors of any width."""
    chosen = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", CONSTANT_PIECES]
    subprocess.run(command, env={**os.environ, **chosen}, check=True, timeout=120)


@pytest.fixture
def exact_shapes(monkeypatch):
    """The shapes that were summed in float64 from the first element on."""
    shapes, row_sums = [], host._row_sums

    def watched(matrix, order, *, exact):
        shapes.extend([tuple(matrix.shape)] if exact else [])
        return row_sums(matrix, order, exact=exact)

    monkeypatch.setattr(host, "_row_sums", watched)
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_only_sums_out_of_range_are_computed_again(exact_shapes, dtype):
    """Not zeros, as of idle experts and of unused rows of an embedding, and no NaN."""
    table = torch.zeros(1000, 300)
    table[::20] = 0.5
    large = torch.randn(SMALL + PIECE)
    cases = [
        ([table, torch.zeros(9000)], True, []),
        ([torch.zeros(SMALL + 1), torch.zeros(3), torch.empty(0)], False, []),
        ([large, torch.full((9,), 1e-3), torch.zeros(2)], False, []),
        ([large, torch.tensor([math.nan])], False, []),
    ]
    if dtype is not torch.float16:
        table = torch.ones(1000, 300)
        table[3, 5], table[500], table[999, 7] = 1e20, 1e-25, math.inf
        tiny = [large, torch.full((10_000,), 1e-25), torch.zeros(9000), torch.ones(4)]
        cases += [([table], True, [(3, 300)]), (tiny, False, [(1, 10_000)])]
    for tensors, rows, needed in cases:
        given = [tensor.to(dtype) for tensor in tensors]
        for order in (2.0,) if needed else (1.0, 2.0, math.inf):
            found, sums = (
                engine.power_sums(given, order, rows=rows) for engine in (ENGINE, REFERENCE)
            )
            torch.testing.assert_close(found, sums, rtol=1e-6, atol=0, equal_nan=True)
            if not needed:
                ENGINE.norm(given, order)
        assert exact_shapes == needed
        exact_shapes.clear()


def test_many_tensors_are_multiplied_in_one_call(monkeypatch):
    calls, multiply = [], torch._foreach_mul_
    monkeypatch.setattr(
        torch, "_foreach_mul_", lambda *given: calls.append(len(given[0])) or multiply(*given)
    )
    given = [torch.ones(5) for _ in range(40)]
    ENGINE.scale_(given, torch.full((40,), 0.5, dtype=torch.float64))
    ENGINE.scale_(given, vector(0.5))
    assert calls == [40, 40]


def test_a_nan_coefficient_is_not_taken_for_one():
    for rows, count in ((True, 6), (False, 2), (False, 1)):
        given = [torch.ones(3), torch.ones(3)]
        numbers = torch.ones(count, dtype=torch.float64)
        numbers[0] = math.nan
        ENGINE.scale_(given, numbers, rows=rows)
        assert math.isnan(given[0][0])


@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_off_the_cpu_no_value_is_read(kind, order):
    """A fake tensor has no values: reading one would raise."""
    with FakeTensorMode():
        tensors = [torch.empty(size, device=kind) for size in [(50, 3), (), (0,), (9000,)]]
        tensors.append(torch.empty(1, device=kind).expand(7))
        norm = gradclip.clip_gradients_(tensors, 1.0, order)
        assert (norm.device.type, norm.dtype, norm.shape) == (kind, torch.float64, ())
        ENGINE.clamp_(tensors, torch.ones(1, device=kind))
        ENGINE.scale_(tensors, torch.ones(len(tensors), device=kind))
        tensors = [torch.empty(size, device=kind) for size in [(50, 3), (7,), (0, 2), (9, 2, 2)]]
        tensors.append(torch.empty(3, 1, device=kind).expand(3, 7))
        numbers = torch.ones(69, device=kind, dtype=torch.float64)
        sums = ENGINE.power_sums(tensors, order, rows=True)
        assert (sums.device.type, sums.dtype, sums.shape) == (kind, torch.float64, (69,))
        ENGINE.clamp_(tensors, numbers, rows=True)
        ENGINE.scale_(tensors, numbers, rows=True)
    windows = torch.empty(100, device="meta").as_strided((9, 20), (10, 1))
    ENGINE.scale_([windows], torch.ones(1, device="meta"))
    windows = torch.empty(100, device="meta").as_strided((4, 3, 5), (12, 2, 1))
    ENGINE.scale_([windows], torch.ones(4, device="meta"), rows=True)
