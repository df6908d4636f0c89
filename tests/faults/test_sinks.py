"""A sink that raises, blocks or is slow: what becomes of the training, and of the other sinks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gradclip import GradientClipper, LoggedStep, MemorySink, Sink

BATCH = 5
TIMEOUT = 60.0


class Acting(Sink):
    """Does something in one of its methods."""

    flush_every = BATCH

    def __init__(self, act: Callable[[], object], method: str = "write") -> None:
        self._act, self._method = act, method
        self.closed = 0

    def write(self, steps: Sequence[LoggedStep]) -> None:
        self._when("write")

    def flush(self) -> None:
        self._when("flush")

    def close(self) -> None:
        self.closed += 1
        self._when("close")

    def _when(self, method: str) -> None:
        if method == self._method:
            self._act()


def indices(sink: MemorySink) -> list[int]:
    return [step.step for step in sink.steps]


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_sink_that_raises_stops_neither_training_nor_the_others(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    class Broken(Sink):
        def write(self, steps: Sequence[LoggedStep]) -> None:
            raise ZeroDivisionError("mine")

        def close(self) -> None:
            raise ZeroDivisionError("mine")

    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=[Broken(), tmp_path])
    with pytest.warns(RuntimeWarning, match="Broken failed .*ZeroDivisionError: mine"):
        run.take(*[1.0] * 100)
    run.take(1.0)
    clipper.close()
    assert clipper.steps == 101
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(101))


def test_a_slow_sink_holds_a_training_up_once_a_batch(training: Any) -> None:
    """Batches are handed over within the step that completes them, and nothing else is."""
    run, held_up, others = training(), [], [MemorySink(), MemorySink()]

    def slowly() -> None:
        time.sleep(0.01)
        held_up.append(len(taken))

    taken: list[int] = []
    with GradientClipper(run.optimizer, 1.0, log=[others[0], Acting(slowly), others[1]]):
        for step in range(4 * BATCH + 2):
            taken.append(step)
            run.take(1.0)
        assert held_up == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]
    assert held_up[4:] == [4 * BATCH + 2]
    assert [indices(other) for other in others] == [[*range(4 * BATCH + 2)]] * 2


def test_a_sink_that_blocks_holds_a_training_until_it_goes_on_and_nothing_is_lost(
    training: Any,
) -> None:
    run, blocked, free = training(), threading.Event(), threading.Event()
    first, last = MemorySink(), MemorySink()
    taken: list[int] = []

    def block() -> None:
        blocked.set()
        assert free.wait(TIMEOUT)

    def train() -> None:
        for step in range(3 * BATCH):
            run.take(1.0)
            taken.append(step)

    clipper = GradientClipper(run.optimizer, 1.0, log=[first, Acting(block), last])
    trains = threading.Thread(target=train, daemon=True)
    trains.start()
    assert blocked.wait(TIMEOUT)
    assert taken == [*range(BATCH - 1)], "the step that completes the batch waits"
    assert indices(first) == [*range(BATCH)], "those before it in the list have theirs"
    assert indices(last) == []
    free.set()
    trains.join(TIMEOUT)
    assert not trains.is_alive()
    clipper.close()
    assert indices(first) == indices(last) == [*range(3 * BATCH)]


def test_an_interrupt_frees_a_training_that_a_sink_blocks(training: Any) -> None:
    """The step was taken. Of those after it in the list, a sink may miss that batch alone."""
    run = training()
    first, last = MemorySink(), MemorySink()
    interrupts = iter([interrupt])
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
def test_an_interrupt_while_closing_leaves_the_clipper_detached_and_the_sinks_closed(
    training: Any, method: str
) -> None:
    run, other = training(), Acting(int)
    sink = Acting(interrupt, method)
    clipper = GradientClipper(run.optimizer, 1.0, log=[sink, other])
    run.take(1.0)
    with pytest.raises(KeyboardInterrupt):
        clipper.close()
    assert (sink.closed, other.closed) == (1, 1)
    assert not run.optimizer._optimizer_step_pre_hooks
    clipper.close()
    assert (sink.closed, other.closed) == (1, 1)
    GradientClipper(run.optimizer, 1.0).close()


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_close_waits_for_a_sink_and_closes_each_once(training: Any, method: str) -> None:
    run, kept = training(), MemorySink()
    ends: list[float] = []

    def slowly() -> None:
        time.sleep(0.02)
        ends.append(time.monotonic())

    sink = Acting(slowly, method)
    clipper = GradientClipper(run.optimizer, 1.0, log=[sink, kept])
    run.take(1.0)
    clipper.close()
    assert time.monotonic() >= ends[-1]
    clipper.close()
    assert (len(ends), sink.closed, indices(kept)) == (1, 1, [0])


def test_a_sink_may_ask_the_clipper_for_its_state(training: Any) -> None:
    """As one that saves checkpoints: the counts are those up to the batch that it is given."""
    run, states, kept = training(), [], MemorySink()

    def save() -> None:
        states.append(clipper.state_dict())
        clipper.flush()

    with GradientClipper(run.optimizer, 0.5, log=[Acting(save), kept]) as clipper:
        run.take(*[1.0] * (2 * BATCH))
        assert [state["steps"] for state in states] == [BATCH, 2 * BATCH]
        assert [state["counters"]["clipped"] for state in states] == [BATCH, 2 * BATCH]
    assert indices(kept) == [*range(2 * BATCH)]


def test_what_a_sink_does_to_torch_stays_its_own_matter(training: Any) -> None:
    """Modes that a sink enters and leaves, or an error within them, reach no step."""
    run = training()

    def fail_under_a_mode() -> None:
        with torch.inference_mode():
            raise RuntimeError("under a mode")

    with GradientClipper(run.optimizer, 1.0, log=Acting(fail_under_a_mode)) as clipper:
        with pytest.warns(RuntimeWarning, match="under a mode"):
            run.take(*[2.0] * BATCH)
        run.take(*[2.0] * BATCH)
        assert not torch.is_inference_mode_enabled()
        assert not clipper.last.norms.is_inference()
        assert clipper.clip_rate() == 1.0
