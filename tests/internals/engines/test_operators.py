"""What is special to the engine of torch operators on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

import gradclip
from gradclip.engines import engine_for
from gradclip.engines.operators import host_sums
from gradclip.engines.operators.host_sums import ROW, SMALL

ENGINE = engine_for("operators", torch.device("cpu"))
REFERENCE = engine_for("reference", torch.device("cpu"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_graph():
    with torch.no_grad():
        yield


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


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

    def looked_again(table, order, exact):
        assert not exact
        return condensed(table, order, exact)

    condensed = host_sums._condensed
    monkeypatch.setattr(host_sums, "_condensed", looked_again)
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
