"""A sink that raises, blocks or is slow: what becomes of the training and of the other sinks."""

import threading
import warnings

import pytest

from gradclip import GradientClipper, MemorySink, Sink
from tests.support.curves import log_run

BATCH = 5
TIMEOUT = 60.0


class Acting(Sink):
    """Does something in some of its methods, and keeps the steps it gets after that."""

    def __init__(self, act, *methods, flush_every=BATCH):
        self.flush_every = flush_every
        self.act, self.methods = act, methods or ("write",)
        self.calls, self.steps = [], []

    def write(self, steps):
        self._when("write")
        self.steps += [step.step for step in steps]

    def flush(self):
        self._when("flush")

    def close(self):
        self._when("close")

    def _when(self, method):
        self.calls.append(method)
        if method in self.methods:
            self.act()


class FailingSink(Acting):
    """Raises in some of its methods."""

    def __init__(self, *methods, flush_every=1):
        super().__init__(self._fail, *methods, flush_every=flush_every)

    def _fail(self):
        raise OSError("no disk")


def indices(sink):
    return [step.step for step in sink.steps]


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_sink_that_fails_is_reported_once(training, method):
    """It is given the next batch, and the other sinks get everything."""
    run, kept = training(), Acting(int, flush_every=100)
    one, other = FailingSink(method), FailingSink(method)
    clipper = GradientClipper(run.optimizer, 1.0, log=[one, other, kept])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run.take(1.0)
            clipper.flush()
        one.methods = () if method == "write" else one.methods
        run.take(1.0)
        clipper.close()
    assert [warning.category for warning in caught] == [RuntimeWarning] * 2
    text = (
        "FailingSink failed and may miss steps: OSError: no disk. Training goes on, and its later "
        "failures are not reported. Check that its destination is writable."
    )
    assert [str(warning.message) for warning in caught] == [text] * 2
    assert one.steps == ([2] if method == "write" else [0, 1, 2])
    assert kept.steps == [0, 1, 2]
    assert kept.calls == ["write", "flush"] * 3 + ["close"]


def test_warnings_as_errors(training):
    """The other sinks are served first."""
    run, kept = training(), Acting(int)
    clipper = GradientClipper(run.optimizer, 1.0, log=[FailingSink("write", "close"), kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            run.take(1.0)
        clipper.close()
    assert kept.calls == ["write", "flush", "close"]


def test_sink_cannot_change_the_steps_of_another():
    class Greedy(Sink):
        def write(self, steps):
            steps.clear()

    kept = MemorySink()
    with pytest.warns(RuntimeWarning, match="Greedy failed"):
        log_run([Greedy(), kept], 1.0)
    assert indices(kept) == [0]


def test_sinks_are_closed_when_the_device_fails(training, monkeypatch):
    def take(*_, wait):
        raise RuntimeError("device lost")

    run, kept = training(), Acting(int)
    clipper = GradientClipper(run.optimizer, 1.0, log=kept)
    with monkeypatch.context() as patch:
        patch.setattr("gradclip.records.buffer.RecordBuffer.take", take)
        with pytest.raises(RuntimeError, match="device lost"):
            clipper.close()
    assert kept.calls == ["close"]


def test_sink_that_blocks_holds_a_training_until_it_goes_on(training):
    """No sink misses a step."""
    run, blocked, free = training(), threading.Event(), threading.Event()
    first, last, taken = MemorySink(), MemorySink(), []

    def block():
        blocked.set()
        assert free.wait(TIMEOUT)

    def train():
        for step in range(3 * BATCH):
            run.take(1.0)
            taken.append(step)

    clipper = GradientClipper(run.optimizer, 1.0, log=[first, Acting(block), last])
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert blocked.wait(TIMEOUT)
    assert taken == [*range(BATCH - 1)], "the step that completes the batch waits"
    assert indices(first) == [*range(BATCH)], "those before it in the list have theirs"
    assert indices(last) == []
    free.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    clipper.close()
    assert indices(first) == indices(last) == [*range(3 * BATCH)]


def test_interrupt_frees_a_training_that_a_sink_blocks(training):
    """The step was taken. Of those after it in the list, a sink may miss that batch alone."""
    run, interrupts = training(), iter([interrupt])
    first, last = MemorySink(), MemorySink()
    sink = Acting(lambda: next(interrupts, int)())
    clipper = GradientClipper(run.optimizer, 1.0, log=[first, sink, last])
    run.take(*[1.0] * (BATCH - 1))
    with pytest.raises(KeyboardInterrupt):
        run.take(1.0)
    assert clipper.steps == BATCH
    run.take(*[1.0] * (BATCH + 1))
    clipper.close()
    assert indices(first) == [*range(2 * BATCH + 1)]
    assert indices(last)[-BATCH - 1 :] == [*range(BATCH, 2 * BATCH + 1)]


@pytest.mark.parametrize("method", ["write", "flush"])
def test_interrupt_while_closing(training, method):
    """The clipper is detached and the sinks are closed, once."""
    run, other, sink = training(), Acting(int), Acting(interrupt, method)
    clipper = GradientClipper(run.optimizer, 1.0, log=[sink, other])
    run.take(1.0)
    with pytest.raises(KeyboardInterrupt):
        clipper.close()
    assert not run.optimizer._optimizer_step_pre_hooks
    clipper.close()
    assert sink.calls.count("close") == other.calls.count("close") == 1
    GradientClipper(run.optimizer, 1.0).close()


def test_sink_may_ask_the_clipper_for_its_state(training):
    """As one that saves checkpoints: the counts are those up to the batch that it gets."""
    run, states, kept = training(), [], MemorySink()

    def save():
        states.append(clipper.state_dict())
        clipper.flush()

    with GradientClipper(run.optimizer, 0.5, log=[Acting(save), kept]) as clipper:
        run.take(*[1.0] * (2 * BATCH))
        assert [state["steps"] for state in states] == [BATCH, 2 * BATCH]
        assert [state["counters"]["clipped"] for state in states] == [BATCH, 2 * BATCH]
    assert indices(kept) == [*range(2 * BATCH)]
