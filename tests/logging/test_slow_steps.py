"""Steps that take long: what was logged is on disk before the next one ends."""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import CallableSink, GradientClipper, JsonlSink, MemorySink, TensorBoardSink
from tests.support.curves import Kept, indices_in, lines_in, steps_in

PRE = "grad_norm/pre"


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def sink_and_steps(kind: str, path):
    """Return a sink, and what reads the indices of the steps that it has written."""
    if kind == "memory":
        memory = MemorySink()
        return memory, lambda: indices_in(memory)
    if kind == "callable":
        steps: list[int] = []
        return CallableSink(lambda _, step: steps.append(step)), lambda: steps
    if kind == "own":
        kept = Kept()
        return kept, lambda: indices_in(kept)
    if kind == "jsonl":
        return JsonlSink(path / "a.jsonl"), lambda: [
            line["step"] for line in lines_in(path / "a.jsonl")
        ]
    sink = TensorBoardSink(path if kind == "directory" else SummaryWriter(str(path)))
    return sink, lambda: steps_in(path).get(PRE, [])


KINDS = ["memory", "callable", "own", "jsonl", "directory", "writer"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_half_a_minute_is_written_at_its_end(kind, tmp_path, training, clock):
    """Before the next step, which may crash; quick steps are written in batches."""
    run, (sink, written) = training(), sink_and_steps(kind, tmp_path)
    clipper = GradientClipper(run.optimizer, 1.0, log=sink)
    for step in range(3):
        clock.now += 30
        run.take(2.0)
        assert written() == [*range(step + 1)]
    for _ in range(4):
        clock.now += 1
        run.take(2.0)
    assert written() == [0, 1, 2]
    clock.now += 30
    run.take(2.0)
    assert written() == [*range(8)]
    clipper.close()
    assert written() == [*range(8)]


def test_quick_steps_wait_for_ten_seconds_at_most(training, clock):
    """A crash loses less than half a minute of curves, however many steps a batch may have."""
    run, kept = training(), Kept(flush_every=10_000)
    GradientClipper(run.optimizer, 1.0, log=kept)
    for _ in range(300):
        clock.now += 0.25
        run.take(1.0)
    assert len(kept.steps) > 300 - 10 / 0.25
    assert {*map(len, kept.batches)} == {40}
