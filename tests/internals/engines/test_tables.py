from __future__ import annotations

import pytest
import torch

from gradclip import EngineUnavailableError
from gradclip.engines.reference import ReferenceEngine
from gradclip.engines.triton import requests as tables
from gradclip.engines.triton.requests import Recent, Uploaded

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


# Recent


def test_what_belongs_to_a_key_is_made_once():
    made = []
    recent = Recent(2)
    for _ in range(3):
        recent.get("a", lambda: made.append("a") or len(made))
    assert made == ["a"]
    assert recent.get("a", pytest.fail) == 1


def test_what_was_used_longest_ago_is_dropped_first():
    recent = Recent(2)
    recent.get("a", lambda: 1)
    recent.get("b", lambda: 2)
    assert recent.get("a", pytest.fail) == 1
    recent.get("c", lambda: 3)
    assert [key in recent for key in "abc"] == [True, False, True]
    assert recent.get("b", lambda: 4) == 4
    assert [key in recent for key in "abc"] == [False, True, True]


def test_looking_for_a_key_does_not_count_as_using_it():
    recent = Recent(2)
    recent.get("a", lambda: 1)
    recent.get("b", lambda: 2)
    assert "a" in recent
    recent.get("c", lambda: 3)
    assert "a" not in recent


def test_nothing_that_was_made_is_made_again_for_being_false():
    recent = Recent(1)
    assert recent.get("a", lambda: None) is None
    assert recent.get("a", pytest.fail) is None


def test_what_could_not_be_made_is_not_kept():
    recent = Recent(1)
    with pytest.raises(ZeroDivisionError):
        recent.get("a", lambda: 1 // 0)
    assert "a" not in recent
    assert recent.get("a", lambda: 5) == 5


# Uploaded, to the host


def test_on_the_host_tables_are_where_they_are_wanted():
    given = [torch.arange(3), torch.arange(4)]
    uploaded = Uploaded(given, CPU)
    assert all(one is other for one, other in zip(uploaded.ready(), given, strict=True))


def test_what_a_graph_reads_is_kept(captured, kept):
    uploaded = Uploaded([torch.arange(3)], CPU)
    uploaded.ready()
    assert not kept
    with captured():
        for _ in range(2):
            assert uploaded.ready()[0].tolist() == [0, 1, 2]
    assert [*kept.values()] == [uploaded]


# Uploaded, to a device with streams


class Stream:
    device = GPU

    def __init__(self, log):
        self._log = log

    def record_event(self):
        self._log.append(("record", self))
        return "event"

    def wait_event(self, event):
        self._log.append(("wait", self, event))


class Table:
    def __init__(self, log):
        self._log = log

    def record_stream(self, stream):
        self._log.append(("used on", stream, self))


@pytest.fixture
def log():
    return []


@pytest.fixture
def stream_is(monkeypatch, log):
    """Make a stream the current one, on a machine that may have none."""
    # Sending is part of what is logged, since the event must come after.
    monkeypatch.setattr(tables, "_copied", lambda table, device: log.append("send") or table)

    def enter(stream):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)

    return enter


def test_on_the_stream_that_sent_nothing_waits(stream_is, log):
    stream, given = Stream(log), [Table(log), Table(log)]
    stream_is(stream)
    uploaded = Uploaded(given, GPU)
    assert log == ["send", "send", ("record", stream)]
    assert uploaded.ready() == given
    assert len(log) == 3


def test_another_stream_waits_and_keeps_the_memory(stream_is, log):
    first, second, given = Stream(log), Stream(log), [Table(log), Table(log)]
    stream_is(first)
    uploaded = Uploaded(given, GPU)
    stream_is(second)
    for _ in range(2):
        log.clear()
        assert uploaded.ready() == given
        used = [("used on", second, table) for table in given]
        assert log == [("wait", second, "event"), *used]


def test_a_graph_waits_for_no_event_from_outside(stream_is, log, captured):
    stream_is(Stream(log))
    uploaded = Uploaded([Table(log)], GPU)
    stream_is(Stream(log))
    log.clear()
    with captured():
        uploaded.ready()
    assert log == []


@pytest.mark.cuda
@pytest.mark.usefixtures("on_cuda")
def test_tables_arrive_on_every_stream():
    device = torch.device("cuda", torch.cuda.current_device())
    given = [torch.arange(n, device="cpu") for n in (3, 1_000_000)]
    with torch.cuda.stream(torch.cuda.Stream()):
        uploaded = Uploaded(given, device)
    copies = [table.clone() for table in uploaded.ready()]  # on another stream
    for copy, table in zip(copies, given, strict=True):
        assert copy.is_cuda
        assert torch.equal(copy.cpu(), table)
    given[0][0] = 7
    assert uploaded.ready()[0][0].item() == 0


# What the engine of Triton kernels sends


@pytest.fixture
def launching(triton_engine):
    from gradclip.engines.triton import launching

    return launching


@pytest.fixture
def uploads(triton_engine, monkeypatch):
    """What was sent to the device."""
    sent = []

    class Counted(Uploaded):
        def __init__(self, *arguments):
            sent.append(self)
            super().__init__(*arguments)

    monkeypatch.setattr("gradclip.engines.triton.requests.Uploaded", Counted)
    return sent


@pytest.mark.cuda
@pytest.mark.interpreted
def test_addresses_are_sent_when_they_change_and_all_else_once(triton_engine, uploads):
    tensors, half = [torch.rand(20), torch.rand(5)], torch.full((1,), 0.5)
    for _ in range(2):
        triton_engine.norm(tensors, 2.0)
        triton_engine.scale_(tensors, half)
    assert len(uploads) == 2
    others = [tensor.clone() for tensor in tensors]
    triton_engine.norm(others, 2.0)
    assert len(uploads) == 3
    triton_engine.norm(tensors, 1.0)
    assert len(uploads) == 3
    triton_engine.norm(tensors[::-1], 2.0)
    assert len(uploads) == 5


@pytest.mark.cuda
@pytest.mark.interpreted
@pytest.mark.parametrize("many", [1, 7, 8, 9, 20])
def test_kernels_write_addresses(launching, many):
    addresses = [0x7F12_3456_7890 + 16 * index for index in range(many)]
    given = [*addresses]
    given[many // 2] = 0  # that of an empty tensor, which nobody looks for
    found = launching.written_by_kernels(torch.empty(1).device, [*given])[:many].tolist()
    del addresses[many // 2], found[many // 2]
    assert found == addresses


@pytest.mark.cuda
@pytest.mark.interpreted
def test_within_a_graph_shapes_must_be_known(triton_engine, uploads, captured, kept):
    half = torch.full((1,), 0.5)
    known, unknown = [torch.rand(1000), torch.rand(3)], [torch.rand(4)]
    for verb, number in ((triton_engine.norm, 2.0), (triton_engine.scale_, half)):
        verb([tensor.clone() for tensor in known], number)
    uploads.clear()
    others = [tensor.clone() for tensor in known]
    norm = ReferenceEngine().norm(known, 2.0).item()
    with captured():
        for verb, number in (
            (triton_engine.norm, 2.0),
            (triton_engine.power_sums, 2.0),
            (triton_engine.scale_, half),
            (triton_engine.clamp_, half),
        ):
            with pytest.raises(EngineUnavailableError, match="of these shapes before the CUDA gr"):
                verb(unknown, number)
        assert triton_engine.norm(others, 2.0).item() == pytest.approx(norm)
        triton_engine.scale_(others, half)
    assert all(torch.equal(one, 0.5 * two) for one, two in zip(others, known, strict=True))
    assert uploads == []
    assert len(kept) == 1


@pytest.mark.cuda
@pytest.mark.interpreted
def test_within_a_graph_kernels_must_be_loaded(triton_engine, captured, launching, monkeypatch):
    monkeypatch.setattr(launching, "_launched", set())
    half, tensors = torch.full((1,), 0.5), [torch.rand(1000), torch.rand(3)]
    launching.written_by_kernels(half.device, [0])
    triton_engine.norm(tensors, 2.0)
    with captured():
        triton_engine.norm(tensors, 2.0)
        for refused in (
            lambda: triton_engine.norm(tensors, 1.0),
            lambda: triton_engine.power_sums(tensors, 2.0),
            lambda: triton_engine.norm([tensor.half() for tensor in tensors], 2.0),
            lambda: triton_engine.scale_(tensors, half),
        ):
            with pytest.raises(EngineUnavailableError, match="by this norm, of this dtype, or in"):
                refused()
