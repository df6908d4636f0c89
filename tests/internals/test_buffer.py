"""Records stay on their device until their batch is copied, and are read when that is done."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradclip.records.buffer import RecordBuffer
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Recorder


class Device:
    """A stand-in for a CUDA device and its events: copies to the host arrive when it says so."""

    def __init__(self):
        self.done, self.operators, self.copies, self.waits = False, [], [], []

    def record(self, stream):
        assert stream == "stream of cuda:0"

    def query(self):
        return self.done

    def synchronize(self):
        if not self.done:
            self.waits.append("event")
            self.finish()

    def finish(self):
        self.done = True
        for target, source in self.copies:
            target.copy_(source)
        self.copies = []

    def records(self, count):
        for step in range(count):
            values = (torch.full((1,), number, dtype=torch.float64) for number in (step, 1.0, 1.0))
            yield ClipRecord(step, 0.0, *(DeviceTensor(value, self) for value in values))


class DeviceTensor(Tensor):
    """A tensor that says it is on CUDA and refuses every way to the host but a later copy."""

    @staticmethod
    def __new__(cls, values, owner):
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")
        made.values, made.device_of = values, owner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        owner = next(t.device_of for t in tree_leaves((args, kwargs)) if isinstance(t, cls))
        owner.operators.append(str(function))
        if function is torch.ops.aten.copy_.default:
            target, source, non_blocking = args
            assert non_blocking, "a blocking copy waits for the device"
            owner.copies.append((target, source.values))
            return target
        if function is torch.ops.aten.new_zeros.default:
            return cls(torch.zeros(args[1], dtype=kwargs.get("dtype")), owner)
        if function is torch.ops.aten.new_full.default:
            return cls(torch.full(args[1], args[2]), owner)
        if function is torch.ops.aten.stack.default:
            return cls(torch.stack([part.values for part in args[0]]), owner)
        if function is torch.ops.aten.view.default:
            return cls(args[0].values.view(args[1]), owner)
        raise AssertionError(f"{function} is no way to treat a tensor on a device")


@pytest.fixture
def late_device(monkeypatch):
    def empty_like(like, *, device, pin_memory):
        assert device == "cpu"
        assert pin_memory, "a copy to other memory is not asynchronous"
        return torch.full(like.shape, -1.0, dtype=like.dtype)

    owner = Device()
    monkeypatch.setattr(torch.cuda, "Event", lambda: owner)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: f"stream of {of}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda of: owner.waits.append(str(of)))
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return owner


def filled(records, capacity):
    buffer = RecordBuffer(capacity)
    for record in records:
        buffer.append(record)
    return buffer


def host_record(*norms):
    ones = torch.ones(len(norms), dtype=torch.float64)
    return ClipRecord(0, 0.0, torch.tensor(norms, dtype=torch.float64), ones, ones)


def norms_in(batch):
    return batch.values()[0].tolist()


def test_full_batch_is_copied_once_and_read_only_after_its_event(late_device):
    """A step before that runs no operator."""
    *first, last = late_device.records(4)
    buffer = filled(first, 4)
    assert list(buffer.take(wait=False)) == late_device.operators == []
    buffer.append(last)
    assert late_device.operators == [
        "aten.stack.default",
        "aten.view.default",
        "aten.copy_.default",
    ]
    assert list(buffer.take(wait=False)) == list(buffer.take(wait=False)) == []
    late_device.finish()
    (batch,) = buffer.take(wait=False)
    assert norms_in(batch) == [[0.0], [1.0], [2.0], [3.0]]


def test_taking_everything_waits_for_the_device_and_the_copy(late_device):
    (batch,) = (buffer := filled(late_device.records(3), 4)).take(wait=True)
    assert late_device.waits == ["cuda:0"], "the steps may have run on another stream"
    assert norms_in(batch) == [[0.0], [1.0], [2.0]]
    assert late_device.waits == ["cuda:0", "event"]
    assert list(buffer.take(wait=True)) == []


def test_recorder_counts_late_copies_in_order_without_waiting(late_device):
    recorder = Recorder([], order=2.0)
    recorder._buffer = RecordBuffer(2)
    for record in late_device.records(5):
        recorder.add(record)
    assert recorder._counter.counters.finite == 0
    late_device.finish()
    recorder._deliver(wait=False)
    assert recorder._counter.counters.finite == 4
    assert late_device.waits == []
    assert recorder.counters.finite == 5


def test_step_on_the_host_runs_no_operator():
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(f"{function} in an ordinary step")

    recorder, records = Recorder([], order=2.0), [host_record(1.0) for _ in range(10)]
    with Refuses():
        for record in records:
            recorder.add(record)
        with pytest.raises(AssertionError, match="stack"):
            recorder.flush()


def test_records_of_another_number_of_norms_begin_a_batch():
    """A batch has copies of the tensors: a threshold may reuse its tensor later."""
    records = [host_record(1.0), host_record(2.0), host_record(3.0, 4.0)]
    batches = [*filled(records, 10).take(wait=True)]
    records[-1].norms.fill_(5.0)
    assert [*map(norms_in, batches)] == [[[1.0], [2.0]], [[3.0, 4.0]]]
