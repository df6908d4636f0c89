"""A sink that raises, blocks or is slow: what becomes of the training and of the other sinks."""

import gc
import threading
import warnings

import pytest

from gradclip import GradientClipper, MemorySink, Sink
from tests.support.curves import Kept, indices_in, log_run

BATCH = 5
TIMEOUT = 60.0


def fail():
    raise OSError("no disk")


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_sink_that_fails_is_reported_once(training, method):
    """It is given the next batch, and the other sinks get everything."""
    run, kept = training(), Kept()
    one, other = Kept(fail, method, flush_every=1), Kept(fail, method)
    clipper = GradientClipper(run.optimizer, 1.0, log=[one, other, kept])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run.take(1.0)
            clipper.flush()
        one.methods = () if method == "write" else one.methods
        run.take(1.0)
        clipper.close()
    text = (
        "Kept failed and may miss steps: OSError: no disk. Training goes on, and its later "
        "failures are not reported. Check that its destination is writable."
    )
    assert [(w.category, str(w.message)) for w in caught] == [(RuntimeWarning, text)] * 2
    assert indices_in(one) == ([2] if method == "write" else [0, 1, 2])
    assert indices_in(kept) == [0, 1, 2]
    assert kept.calls == ["begin", *["write", "flush"] * 3, "close"]


def test_warnings_as_errors(training):
    """The other sinks are served first."""
    run, kept = training(), Kept()
    failing = Kept(fail, "write", "close", flush_every=1)
    clipper = GradientClipper(run.optimizer, 1.0, log=[failing, kept])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            run.take(1.0)
        clipper.close()
    assert kept.calls == ["begin", "write", "flush", "close"]


def test_sink_cannot_change_the_steps_of_another():
    class Greedy(Sink):
        def write(self, steps):
            steps.clear()

    kept = MemorySink()
    with pytest.warns(RuntimeWarning, match="Greedy failed"):
        log_run([Greedy(), kept], 1.0)
    assert indices_in(kept) == [0]


def test_sinks_are_closed_when_the_device_fails(training, monkeypatch):
    def take(*_, wait):
        raise RuntimeError("device lost")

    run, kept = training(), Kept()
    clipper = GradientClipper(run.optimizer, 1.0, log=kept)
    gc.collect()  # clippers of other tests read their records when they are collected
    with monkeypatch.context() as patch:
        patch.setattr("gradclip.records.buffer.RecordBuffer.take", take)
        with pytest.raises(RuntimeError, match="device lost"):
            clipper.close()
    assert kept.calls == ["begin", "close"]


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

    log = [first, Kept(block, flush_every=BATCH), last]
    clipper = GradientClipper(run.optimizer, 1.0, log=log)
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    assert blocked.wait(TIMEOUT)
    assert taken == [*range(BATCH - 1)], "the step that completes the batch waits"
    assert indices_in(first) == [*range(BATCH)], "those before it in the list have theirs"
    assert indices_in(last) == []
    free.set()
    thread.join(TIMEOUT)
    assert not thread.is_alive()
    clipper.close()
    assert indices_in(first) == indices_in(last) == [*range(3 * BATCH)]


def test_interrupt_frees_a_training_that_a_sink_blocks(training):
    """The step was taken. Of those after it in the list, a sink may miss that batch alone."""
    run, interrupts = training(), iter([interrupt])
    first, last = MemorySink(), MemorySink()
    sink = Kept(lambda: next(interrupts, int)(), flush_every=BATCH)
    clipper = GradientClipper(run.optimizer, 1.0, log=[first, sink, last])
    run.take(*[1.0] * (BATCH - 1))
    with pytest.raises(KeyboardInterrupt):
        run.take(1.0)
    assert clipper.steps == BATCH
    run.take(*[1.0] * (BATCH + 1))
    clipper.close()
    assert indices_in(first) == [*range(2 * BATCH + 1)]
    assert indices_in(last)[-BATCH - 1 :] == [*range(BATCH, 2 * BATCH + 1)]


@pytest.mark.parametrize("method", ["write", "flush"])
def test_interrupt_while_closing(training, method):
    """The clipper is detached and the sinks are closed, once."""
    run, other, sink = training(), Kept(), Kept(interrupt, method)
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

    log = [Kept(save, flush_every=BATCH), kept]
    with GradientClipper(run.optimizer, 0.5, log=log) as clipper:
        run.take(*[1.0] * (2 * BATCH))
        counts = [(state["steps"], state["counters"]["clipped"]) for state in states]
        assert counts == [(BATCH, BATCH), (2 * BATCH, 2 * BATCH)]
    assert indices_in(kept) == [*range(2 * BATCH)]
