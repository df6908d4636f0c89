"""The Triton engine beyond the contract: pieces, alignment, rows, gaps, and what it keeps."""

import gc
import math
import weakref
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import gradclip
from gradclip import EngineUnavailableError, engines
from gradclip.engines.base import RelativeLimit, TensorList
from gradclip.engines.layout import addresses_of
from gradclip.engines.reference import ReferenceEngine
from gradclip.engines.triton.plan import plan
from gradclip.thresholds import RelativeToWeights
from tests.support.clippers import stepped
from tests.support.engines import INTERPRETED, random, vector

pytestmark = [pytest.mark.interpreted, pytest.mark.cuda]

REFERENCE = ReferenceEngine()
MIXED = (1, 0, 15, 16, 17, 255, 256, 257, 700, 3)
"""Lengths around a block of 16 elements and a piece of 16 blocks."""


@pytest.fixture
def triton(triton_engine):
    """The module, which only a process that has tests for it imports."""
    from gradclip.engines.triton import engine as triton

    return triton


@pytest.fixture
def tiny(triton):
    """An engine with blocks so small that few elements make many pieces and programs."""
    with torch.no_grad():
        yield triton.TritonEngine(block=16)


def mixed_lengths(dtype=torch.float32):
    return [random(length, dtype=dtype) for length in MIXED]


def measured_alike(engine, tensors, order):
    """Return whether an engine measures tensors as the reference does."""
    found, expected = (
        [*one.power_sums(tensors, order).tolist(), one.norm(tensors, order, scalar=True).item()]
        for one in (engine, REFERENCE)
    )
    return found == pytest.approx(expected, rel=1e-6, abs=0)


def changed_alike(engine, tensors, numbers, *, limit):
    """Return whether an engine changes tensors as the reference does, up to one rounding."""
    expected = [tensor.clone() for tensor in tensors]
    verb = "clamp_" if limit else "scale_"
    getattr(engine, verb)(tensors, numbers)
    getattr(REFERENCE, verb)(expected, numbers)
    rounding = 0 if limit else torch.finfo(tensors[0].dtype).eps
    return all_close(tensors, expected, rounding)


def all_close(found, expected, rel):
    return all(
        torch.allclose(one, other, rtol=rel, atol=0, equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )


# Many pieces and programs


@pytest.mark.parametrize(
    "order",
    [1.0, 1.5, 2.0, math.inf, *(pytest.param(p, marks=pytest.mark.slow) for p in (3.0, 7.3))],
)
def test_many_pieces_are_measured(tiny, dtype, order):
    assert plan(MIXED, block=16).grouped > 1
    unlike = torch.tensor([0.0, 1e4, 1e-4], dtype=dtype)
    assert measured_alike(tiny, [*mixed_lengths(dtype), unlike, torch.zeros(300).to(dtype)], order)


@pytest.mark.parametrize("limit", [False, True])
def test_many_pieces_are_changed(tiny, dtype, limit):
    tensors = mixed_lengths(dtype)
    assert changed_alike(tiny, tensors, vector(0.3), limit=limit)
    each = vector(*(0.1 * index for index in range(len(MIXED))))
    assert changed_alike(tiny, tensors, each, limit=limit)


# Alignment


def test_bits_do_not_depend_on_where_a_tensor_begins(tiny, dtype):
    values, coefficient, orders = random(700, dtype=dtype), vector(0.3), (1.0, 2.0, math.inf)
    sums = [tiny.power_sums([values], order) for order in orders]
    norms = [tiny.norm([values], order) for order in orders]
    scaled = values.clone()
    tiny.scale_([scaled], coefficient)
    for offset in (1, 2, 3):
        buffer = torch.zeros(710, dtype=dtype)
        moved = buffer[offset:][:700].copy_(values)
        for index, order in enumerate(orders):
            assert torch.equal(tiny.power_sums([moved], order), sums[index])
            assert torch.equal(tiny.norm([moved], order), norms[index])
        tiny.scale_([moved], coefficient)
        assert torch.equal(moved, scaled)
        assert not bool(buffer[:offset].any() | buffer[offset + 700 :].any())


# Beyond the range of float32


def test_only_what_left_the_range_of_float32_is_read_again(tiny, monkeypatch):
    if not INTERPRETED:
        pytest.skip("only the interpreter shows what is read")
    from triton.runtime.interpreter import InterpreterBuilder

    read, load = [], InterpreterBuilder.create_masked_load

    def seen(builder, at, mask, *others):
        read.append(int(mask.data.sum()) if at.data.size == 16 else 0)
        return load(builder, at, mask, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", seen)
    for value, times in ((0.0, 1), (1.0, 1), (1e-20, 2), (1e20, 2)):
        tensor = torch.full((100,), value)
        read.clear()
        tiny.power_sums([tensor], 2.0)
        assert sum(read) == times * 100


# Rows


@pytest.mark.parametrize("verb", ["power_sums", "scale_"])
def test_narrow_rows_are_left_to_torch_operators(tiny, triton, monkeypatch, verb):
    given, done = [], getattr(triton.OPERATORS, verb)
    monkeypatch.setattr(
        triton.OPERATORS, verb, lambda *of, **rows: given.extend(of[0]) or done(*of, **rows)
    )
    tensors = [random(70, 3), random(3, 100), random(66, 2), random(5, 40)[:, :20], random(1, 300)]
    getattr(tiny, verb)(tensors, 2.0 if verb == "power_sums" else vector(0.5), rows=True)
    assert [tensor.shape for tensor in given] == [(70, 3), (66, 2)]


@pytest.mark.parametrize("write", [True, False])
def test_rows_are_clipped_by_one_launch(tiny, triton, monkeypatch, write):
    """Of many programs, none of which shares a row with another."""
    monkeypatch.setattr(triton, "launch", launched := Mock(wraps=triton.launch))
    shapes = [(70, 90), (3, 200), (30,), ()]
    gradients, weights = (TensorList(random(*shape) for shape in shapes) for _ in range(2))
    needed = [row.norm().item() for one in gradients for row in (one if one.dim() > 1 else [one])]
    assert tiny.prepare_rows(gradients, weights, 2.0, rows=True) == 75
    limit = RelativeLimit(0.5, 1e-3)
    found = tiny.clip_rows_(gradients, weights, 2.0, limit, erase=False, write=write)
    assert found[0].tolist() == pytest.approx(needed, rel=1e-6)
    launched.assert_called_once()
    name, _, programs, *_ = launched.call_args.args
    assert (name, programs > 9) == ("clip_rows", True)


def test_rows_that_are_not_worth_a_piece_or_do_not_fit_into_one_are_not_prepared(tiny):
    for shape in ((70, 3), (2, 257)):
        pair = TensorList([random(*shape)]), TensorList([random(*shape)])
        assert tiny.prepare_rows(*pair, 2.0, rows=True) == 0


# What is kept between calls


def test_every_program_that_arrived_is_forgotten(tiny):
    for tensors in (mixed_lengths(), [random(5)], mixed_lengths()):
        for order in (2.0, math.inf):
            assert measured_alike(tiny, tensors, order)
            assert [ended.item() for _, ended in tiny._requests._scratch.values()] == [0]


def test_a_list_is_looked_at_once(tiny, monkeypatch):
    looked = Mock(wraps=addresses_of)
    monkeypatch.setattr("gradclip.engines.triton.requests.addresses_of", looked)
    tensors = TensorList([random(20), random(3)])
    expected = 0.5 * tensors[0]
    assert measured_alike(tiny, tensors, 2.0)
    tiny.scale_(tensors, vector(0.5))
    looked.assert_called_once()
    assert torch.equal(tensors[0], expected)


def test_a_list_with_gaps_is_written_where_it_lies(tiny):
    tensors = TensorList([random(5, 6)[:, ::2], random(3, 4).t()])
    expected = [0.5 * tensor for tensor in tensors]
    tiny.norm(tensors, 2.0)
    tiny.scale_(tensors, vector(0.5))
    assert all(map(torch.equal, tensors, expected))


def test_a_list_goes_with_its_tensors_when_nobody_holds_them(tiny):
    tensors = TensorList([random(20), random(3)])
    references = [weakref.ref(tensor) for tensor in tensors]
    gc.disable()  # which would find a cycle
    try:
        tiny.norm(tensors, 2.0)
        tiny.scale_(tensors, vector(0.5))
        del tensors
        assert [tensor() for tensor in references] == [None, None]
    finally:
        gc.enable()


# Autograd, and devices that are not supported


def test_autograd_sees_that_a_tensor_was_scaled(tiny):
    weight = torch.ones(3, requires_grad=True)
    tensor = torch.ones(3)
    with torch.enable_grad():
        loss = (weight * tensor).sum()
    version = tensor._version
    tiny.scale_([tensor, random(2)], vector(1.0))
    assert tensor._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_unsupported_device_is_refused(tiny, monkeypatch):
    other = torch.device("cuda" if INTERPRETED else "cpu")
    where = "where TRITON_INTERPRET is set" if INTERPRETED else "of type cuda,"
    assert where in tiny.unsupported(other)
    assert tiny.unsupported(torch.empty(1).device) is None
    monkeypatch.setattr("gradclip.engines.triton.launching.DEVICE", "elsewhere")
    with pytest.raises(EngineUnavailableError, match="devices of type elsewhere"):
        tiny.norm([random(3)], 2.0)


# Through the names that users call


def clipped_with(engine, monkeypatch, clip):
    """Clip the same gradients with an engine; return the norms, if it does, and the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 9), nn.Linear(9, 80), nn.Linear(300, 2))
    for parameter in model.parameters():
        parameter.grad = random(*parameter.shape)
    monkeypatch.setitem(engines._BEST, torch.empty(1).device.type, engine)
    norms = clip(model)
    return [*([] if norms is None else [norms]), *(one.grad for one in model.parameters())]


def step(model, max_norm=0.7, **options):
    return stepped(torch.optim.SGD(model.parameters(), lr=0.0), max_norm, **options).last.norms


def spoilt(model):
    model[1].weight.grad[1, 1] = math.nan
    return step(model, scope="parameter", nonfinite="zero")


def relative(model, **options):
    return step(model, max_norm=RelativeToWeights(0.5), **options)


CLIPS = {
    "units, by their weights": lambda model: relative(model, scope="unit"),
    "parameters, by their weights": lambda model: relative(model, scope="parameter"),
    "units, by a function": lambda model: gradclip.clip_grad_units_(model.parameters(), 0.5),
    "norm": lambda model: gradclip.clip_grad_norm_(model.parameters(), 0.7),
    "value": lambda model: gradclip.clip_grad_value_(model.parameters(), 0.3),
    "unit": lambda model: step(model, scope="unit"),
    "max_value": lambda model: step(model, max_value=0.3, norm_type=1.0),
    "nonfinite": spoilt,
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS.keys())
def test_clipping_is_that_of_the_reference(triton_engine, triton, monkeypatch, clip):
    monkeypatch.setattr(triton, "launch", launched := Mock(wraps=triton.launch))
    expected = clipped_with(REFERENCE, monkeypatch, clip)
    launched.assert_not_called()
    found = clipped_with(triton_engine, monkeypatch, clip)
    launched.assert_called()
    assert all_close(found, expected, 1e-6)
