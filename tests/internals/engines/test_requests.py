"""What the Triton engine uploads, keeps and refuses: tables, streams, captured graphs."""

from unittest.mock import Mock, call

import pytest
import torch

from gradclip import EngineUnavailableError
from gradclip.engines.reference import ReferenceEngine

pytest.importorskip("triton", reason="there is no Triton")

from gradclip.engines.triton import launching, requests
from gradclip.engines.triton.requests import Recent, Uploaded

GPU = torch.device("cuda", 0)


def test_the_value_used_longest_ago_is_dropped_first():
    """A value is made once, also a false one; asking for a key is no use of it."""
    recent = Recent(2)
    assert recent.get("a", lambda: None) is recent.get("a", pytest.fail) is None
    recent.get("b", lambda: 2)
    assert recent.get("a", pytest.fail) is None
    assert "b" in recent
    recent.get("c", lambda: 3)
    assert [key in recent for key in "abc"] == [True, False, True]
    with pytest.raises(ZeroDivisionError):
        recent.get("d", lambda: 1 // 0)
    assert "d" not in recent


def test_another_stream_waits_for_the_copy_and_keeps_its_memory(monkeypatch, captured):
    """The stream that copied does not wait, and neither does a graph, replayed after the copy."""
    log = Mock()
    first, second, given = log.first, log.second, [log.one, log.other]
    first.device = second.device = GPU
    log.copy.side_effect = lambda table, device: table
    monkeypatch.setattr(requests, "_copied", log.copy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: first)
    uploaded = Uploaded(given, GPU)
    assert uploaded.ready() == given
    copies = [call.copy(table, GPU) for table in given]
    assert log.mock_calls == [*copies, call.first.record_event()]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: second)
    uses = [call.one.record_stream(second), call.other.record_stream(second)]
    for _ in range(2):
        log.reset_mock()
        assert uploaded.ready() == given
        assert log.mock_calls == [call.second.wait_event(first.record_event.return_value), *uses]
    log.reset_mock()
    with captured():
        uploaded.ready()
    assert log.mock_calls == []


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


@pytest.fixture
def uploads(triton_engine, monkeypatch):
    """What was uploaded to the device."""
    monkeypatch.setattr(requests, "Uploaded", made := Mock(wraps=Uploaded))
    return made.call_args_list


@pytest.mark.cuda
@pytest.mark.interpreted
def test_addresses_are_uploaded_when_they_change_and_plans_once(triton_engine, uploads):
    tensors, half = [torch.rand(20), torch.rand(5)], torch.full((1,), 0.5)
    for _ in range(2):
        triton_engine.norm(tensors, 2.0)
        triton_engine.scale_(tensors, half)
    assert len(uploads) == 2
    triton_engine.norm([tensor.clone() for tensor in tensors], 2.0)
    triton_engine.norm(tensors, 1.0)
    assert len(uploads) == 3
    triton_engine.norm(tensors[::-1], 2.0)
    assert len(uploads) == 5


@pytest.mark.cuda
@pytest.mark.interpreted
def test_inside_a_graph_shapes_must_be_known(triton_engine, uploads, captured, kept):
    """The graph keeps what was uploaded for them, and kernels write the addresses, 8 at a time."""
    half, unknown = torch.full((1,), 0.5), [torch.rand(4)]
    known = [torch.rand(size) for size in (1000, 3, 0, 1, 2, 4, 5, 6, 7)]
    verbs = [(triton_engine.norm, 2.0), (triton_engine.scale_, half)]
    for verb, number in verbs:
        verb([tensor.clone() for tensor in known], number)
    uploads.clear()
    others = [tensor.clone() for tensor in known]
    norm = ReferenceEngine().norm(known, 2.0).item()
    verbs += [(triton_engine.power_sums, 2.0), (triton_engine.clamp_, half)]
    with captured():
        for verb, number in verbs:
            with pytest.raises(EngineUnavailableError, match="of these shapes before the CUDA gr"):
                verb(unknown, number)
        assert triton_engine.norm(others, 2.0).item() == pytest.approx(norm)
        triton_engine.scale_(others, half)
    assert all(torch.equal(one, 0.5 * two) for one, two in zip(others, known, strict=True))
    assert uploads == []
    assert len(kept) == 1


@pytest.mark.cuda
@pytest.mark.interpreted
def test_inside_a_graph_kernels_must_be_loaded(triton_engine, captured, monkeypatch):
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
