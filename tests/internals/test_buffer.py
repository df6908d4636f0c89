"""Records stay on their device until their batch is copied, and are read when that is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from gradclip.records.buffer import RecordBuffer
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Recorder


class Device:
    """A stand-in for a CUDA device: its copies to the host arrive when it says so."""

    def __init__(self) -> None:
        self.done = False
        self.operators: list[str] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.waits: list[str] = []

    def finish(self) -> None:
        self.done = True
        for target, source in self.copies:
            target.copy_(source)
        self.copies = []


class DeviceTensor(Tensor):
    """A tensor that says it is on CUDA and refuses every way to the host but a later copy."""

    device_of: Device
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, owner: Device) -> DeviceTensor:
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")
        made.values, made.device_of = values, owner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        owner = next(t.device_of for t in _device_tensors((args, kwargs)))
        owner.operators.append(str(function))
        if function is torch.ops.aten.copy_.default:
            target, source, non_blocking = args
            assert non_blocking, "a blocking copy waits for the device"
            owner.copies.append((target, source.values))
            return target
        if function is torch.ops.aten.new_zeros.default:
            return cls(torch.zeros(args[1], dtype=kwargs.get("dtype")), owner)
        if function is torch.ops.aten.stack.default:
            return cls(torch.stack([part.values for part in args[0]]), owner)
        raise AssertionError(f"{function} is no way to treat a tensor on a device")


def _device_tensors(tree: Any) -> list[DeviceTensor]:
    found: list[DeviceTensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, DeviceTensor) else None, tree)
    return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    owner = Device()

    class Event:
        def record(self, stream: object) -> None:
            assert stream == "stream of cuda:0"

        def query(self) -> bool:
            return owner.done

        def synchronize(self) -> None:
            if not owner.done:
                owner.waits.append("event")
                owner.finish()

    def empty_like(like: Tensor, *, device: str, pin_memory: bool) -> Tensor:
        assert device == "cpu"
        assert pin_memory, "a copy to other memory is not asynchronous"
        return torch.full(like.shape, -1.0, dtype=like.dtype)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"stream of {of}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda of: owner.waits.append(str(of)))
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return owner


def device_records(owner: Device, count: int) -> Iterator[ClipRecord]:
    for step in range(count):
        norms, ones = (torch.full((1,), value, dtype=torch.float64) for value in (step, 1.0))
        yield ClipRecord(step, 0.0, *(DeviceTensor(v, owner) for v in (norms, ones, ones)))


def host_record(step: int, *norms: float) -> ClipRecord:
    ones = torch.ones(len(norms), dtype=torch.float64)
    return ClipRecord(step, 0.0, torch.tensor(norms, dtype=torch.float64), ones, ones)


def test_a_step_runs_no_operator_and_a_full_batch_one_copy(device: Device) -> None:
    buffer = RecordBuffer(4)
    *first, last = device_records(device, 4)
    for record in first:
        buffer.append(record)
        assert list(buffer.take(wait=False)) == []
    assert device.operators == []
    buffer.append(last)
    assert device.operators == ["aten.stack.default"] * 4 + ["aten.copy_.default"]


def test_a_copy_is_read_only_after_its_event(device: Device) -> None:
    buffer = RecordBuffer(4)
    for record in device_records(device, 4):
        buffer.append(record)
    assert list(buffer.take(wait=False)) == []
    assert list(buffer.take(wait=False)) == []
    device.finish()
    (batch,) = buffer.take(wait=False)
    assert batch.values()[0].tolist() == [[0.0], [1.0], [2.0], [3.0]]


def test_who_asks_for_everything_waits_for_the_device_and_the_copy(device: Device) -> None:
    buffer = RecordBuffer(4)
    for record in device_records(device, 3):
        buffer.append(record)
    (batch,) = buffer.take(wait=True)
    assert device.waits == ["cuda:0"], "the steps may have run on another stream"
    assert batch.values()[0].tolist() == [[0.0], [1.0], [2.0]]
    assert device.waits == ["cuda:0", "event"]
    assert list(buffer.take(wait=True)) == []


def test_the_recorder_delivers_late_copies_in_order_without_waiting(device: Device) -> None:
    recorder = Recorder([], order=2.0)
    recorder._buffer = RecordBuffer(2)
    for record in device_records(device, 5):
        recorder.add(record)
    assert recorder._counter.counters.finite == 0
    device.finish()
    recorder._deliver(wait=False)
    assert recorder._counter.counters.finite == 4
    assert device.waits == []
    assert recorder.counters.finite == 5


def test_on_the_host_too_an_ordinary_step_runs_no_operator() -> None:
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            raise AssertionError(f"{function} in an ordinary step")

    recorder = Recorder([], order=2.0)
    records = [host_record(step, 1.0) for step in range(10)]
    with Refuses():
        for record in records:
            recorder.add(record)
        with pytest.raises(AssertionError, match="stack"):
            recorder.flush()


def test_records_of_another_number_of_norms_begin_a_new_batch() -> None:
    buffer = RecordBuffer(10)
    for record in (host_record(0, 1.0), host_record(1, 2.0), host_record(2, 3.0, 4.0)):
        buffer.append(record)
    one, two = buffer.take(wait=True)
    assert one.values()[0].tolist() == [[1.0], [2.0]]
    assert two.values()[0].tolist() == [[3.0, 4.0]]


def test_a_batch_keeps_what_the_tensors_held() -> None:
    """A threshold may reuse its tensor later."""
    buffer = RecordBuffer(1)
    record = host_record(0, 1.0)
    buffer.append(record)
    record.norms.fill_(5.0)
    (batch,) = buffer.take(wait=True)
    assert batch.values()[0].tolist() == [[1.0]]
