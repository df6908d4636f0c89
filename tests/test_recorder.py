"""Steps become plain numbers, are counted, and reach the sinks whatever one of them does."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager

from gradclip import ArgumentError, GradientClipper, LoggedStep, Sink, __version__
from gradclip.records.counting import Counters
from gradclip.records.record import ClipRecord
from gradclip.records.recorder import Recorder

NAN, INF = math.nan, math.inf


class Kept(Sink):
    """Keeps what it is given."""

    def __init__(self, flush_every: int = 100) -> None:
        self.flush_every = flush_every
        self.batches: list[Sequence[LoggedStep]] = []
        self.calls: list[str] = []

    @property
    def steps(self) -> list[LoggedStep]:
        return [step for batch in self.batches for step in batch]

    def write(self, steps: Sequence[LoggedStep]) -> None:
        self.calls.append("write")
        self.batches.append(steps)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")


class Failing(Kept):
    """Raises in some of its methods."""

    def __init__(self, *methods: str) -> None:
        super().__init__(flush_every=1)
        self.methods = methods

    def _act(self, method: str) -> None:
        if method in self.methods:
            raise OSError(f"no {method}")

    def write(self, steps: Sequence[LoggedStep]) -> None:
        self._act("write")
        super().write(steps)

    def flush(self) -> None:
        self._act("flush")
        super().flush()

    def close(self) -> None:
        self._act("close")
        super().close()


def record(
    step: int,
    norms: float | Sequence[float] = 1.0,
    thresholds: float | Sequence[float] = INF,
    coefficients: float | Sequence[float] = 1.0,
    *,
    skipped: bool = False,
) -> ClipRecord:
    given = [[v] if isinstance(v, float) else v for v in (norms, thresholds, coefficients)]
    norm, threshold, coefficient = torch.tensor(given, dtype=torch.float64, device="cpu")
    return ClipRecord(step, 100.0 + step, norm, threshold, coefficient, skipped)


def logged(*records: ClipRecord, order: float = 2.0) -> list[LoggedStep]:
    sink = Kept()
    recorder = Recorder([sink], order)
    for each in records:
        recorder.add(each)
    recorder.flush()
    return sink.steps


def test_one_norm_becomes_a_row_of_plain_numbers() -> None:
    (row,) = logged(record(7, 4.0, 1.0, 0.25))
    assert row == LoggedStep(
        step=7,
        wall_time=107.0,
        norm=4.0,
        clipped_norm=1.0,
        threshold=1.0,
        coefficient=0.25,
        nonfinite=False,
        skipped=False,
        clip_rate=1.0,
        nonfinite_steps=0,
        skipped_steps=0,
    )
    assert [type(value) for value in row] == (
        [int] + [float] * 5 + [bool] * 2 + [float] + [int] * 2 + [type(None)] * 2
    )


@pytest.mark.parametrize(
    ("order", "before", "after"),
    [(2.0, 7.0, math.sqrt(1 + 9 + 9)), (1.0, 11.0, 7.0), (INF, 6.0, 3.0)],
)
def test_several_norms_are_added_up_in_their_own_order(
    order: float, before: float, after: float
) -> None:
    (row,) = logged(record(0, [2.0, 3.0, 6.0], [1.0, 5.0, 3.0], [0.5, 1.0, 0.5]), order=order)
    assert row.norm == pytest.approx(before, rel=1e-15)
    assert row.clipped_norm == pytest.approx(after, rel=1e-15)
    assert row.threshold is None, "there is more than one"
    assert row.coefficient == 0.5
    assert row.clip_rate == 2 / 3


def test_no_threshold_is_none() -> None:
    assert logged(record(0))[0].threshold is None
    assert logged(record(0, thresholds=0.0))[0].threshold == 0.0


def test_what_is_not_finite_is_counted_apart_and_enters_no_mean() -> None:
    rows = logged(
        record(0, 4.0, 1.0, 0.25),
        record(1, NAN, 1.0, 0.0),
        record(2, INF, 1.0, 0.0, skipped=True),
        record(3, 1.0, 1.0, 1.0),
        record(4, [NAN, 2.0], [1.0, 1.0], [0.0, 0.5]),
    )
    assert [row.clip_rate for row in rows] == [1.0, 1.0, 1.0, 0.5, 2 / 3]
    assert [row.nonfinite for row in rows] == [False, True, True, False, True]
    assert [row.nonfinite_steps for row in rows] == [0, 1, 2, 2, 3]
    assert [row.skipped_steps for row in rows] == [0, 0, 1, 1, 1]
    assert [row.clipped_norm for row in rows] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert math.isnan(rows[1].norm)
    assert rows[2].norm == INF


def test_the_rate_is_0_before_the_first_finite_norm() -> None:
    assert logged(record(0, NAN, 1.0, 0.0))[0].clip_rate == 0.0


@pytest.mark.parametrize("sinks", [[], [Kept()]], ids=["no sink", "a sink"])
def test_counters_go_on_from_those_that_were_set(sinks: list[Sink]) -> None:
    recorder = Recorder(sinks, 2.0)
    recorder.add(record(0, 4.0, 1.0, 0.25))
    assert recorder.counters == Counters(clipped=1, finite=1)
    recorder.add(record(1, 4.0, 1.0, 0.25))
    recorder.counters = Counters(clipped=3, finite=10, nonfinite_steps=2, skipped_steps=1)
    recorder.add(record(2, 1.0, 1.0))
    recorder.add(record(3, NAN, 1.0, 0.0, skipped=True))
    assert recorder.counters == Counters(3, 11, 3, 2, skipped_in_a_row=1)


def test_nothing_of_the_callers_surroundings_enters_the_numbers() -> None:
    records = [record(0, [1e30, 3.0], [1.0, 1.0], [1e-30, 1 / 3]), record(1, 5.0, 1.0, 0.2)]
    plain = logged(*records)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            assert logged(*records) == plain
    finally:
        torch.set_default_dtype(torch.float32)


def test_batches_have_the_length_of_the_smallest_flush_every() -> None:
    often, seldom = Kept(flush_every=2), Kept(flush_every=5)
    recorder = Recorder([seldom, often], 2.0)
    for step in range(5):
        recorder.add(record(step))
    for sink in (often, seldom):
        assert [[row.step for row in batch] for batch in sink.batches] == [[0, 1], [2, 3]]
    recorder.flush()
    assert often.steps[-1].step == 4
    assert often.calls == ["write", "write", "write", "flush"]


def test_closing_writes_the_rest_and_happens_once() -> None:
    sink = Kept()
    recorder = Recorder([sink], 2.0)
    recorder.add(record(0))
    recorder.close()
    recorder.close()
    recorder.flush()
    assert sink.calls == ["write", "flush", "close"]
    assert recorder.counters.finite == 1


def test_a_sink_cannot_change_what_another_is_given() -> None:
    class Greedy(Kept):
        def write(self, steps: Sequence[LoggedStep]) -> None:
            steps.clear()  # type: ignore[attr-defined]

    kept = Kept()
    recorder = Recorder([Greedy(), kept], 2.0)
    recorder.add(record(0))
    with pytest.warns(RuntimeWarning, match="Greedy failed"):
        recorder.flush()
    assert len(kept.steps) == 1


@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_a_sink_that_fails_is_reported_once_and_the_others_get_everything(method: str) -> None:
    failing, kept = Failing(method), Kept()
    recorder = Recorder([failing, kept], 2.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            recorder.add(record(step))
            recorder.flush()
        recorder.close()
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert str(warning.message) == (
        f"Failing failed and may miss steps: OSError: no {method}. Training goes on, and its "
        "later failures are not reported. Check that its destination is writable."
    )
    assert [row.step for row in kept.steps] == [0, 1, 2]
    assert kept.calls == ["write", "flush"] * 3 + ["flush", "close"]


def test_each_sink_that_fails_is_reported_and_given_the_next_batch() -> None:
    one, two = Failing("write"), Failing("write")
    recorder = Recorder([one, two], 2.0)
    with pytest.warns(RuntimeWarning) as caught:
        recorder.add(record(0))
    assert len(caught) == 2
    one.methods = ()
    recorder.add(record(1))
    assert [row.step for row in one.steps] == [1]


def test_with_warnings_as_errors_the_other_sinks_are_served_first() -> None:
    kept = Kept(flush_every=1)
    recorder = Recorder([Failing("write", "close"), kept], 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            recorder.add(record(0))
        recorder.close()
    assert kept.calls == ["write", "flush", "close"]


def test_sinks_are_closed_also_when_the_device_fails() -> None:
    class Lost:
        def append(self, record: ClipRecord) -> None: ...

        def take(self, *, wait: bool) -> None:
            raise RuntimeError("device lost")

    kept = Kept()
    recorder = Recorder([kept], 2.0)
    recorder._buffer = Lost()  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="device lost"):
        recorder.close()
    assert kept.calls == ["close"]


@pytest.mark.parametrize("flush_every", [0, -1, 2.0, "10", None, True])
def test_a_flush_every_that_cannot_be_meant_is_refused(flush_every: object) -> None:
    sink = Kept()
    sink.flush_every = flush_every  # type: ignore[assignment]
    with pytest.raises(ArgumentError) as caught:
        Recorder([sink], 2.0)
    assert str(caught.value) == (
        f"Kept.flush_every is {flush_every!r}: give a whole number >= 1 and < 2**62."
    )


def test_a_sink_must_be_able_to_write() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Sink()  # type: ignore[abstract]


def test_a_clipper_that_is_collected_writes_what_is_left() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    sink = Kept()
    clipper = weakref.ref(GradientClipper(optimizer, 1.0, log=sink))
    parameter.grad = torch.ones(2)
    optimizer.step()
    gc.collect()
    assert clipper() is not None, "the optimizer holds it"
    del optimizer
    gc.collect()
    assert clipper() is None
    assert [row.step for row in sink.steps] == [0]
    assert sink.calls == ["write", "flush", "close"]


@contextmanager
def within_a_fake_kernel() -> Iterator[None]:
    """As torch.compile is where it asks a kernel for the shape of its result."""
    with FakeTensorMode() as mode, enable_python_dispatcher(), in_kernel_invocation_manager(mode):
        yield


@pytest.mark.parametrize("mode", [FakeTensorMode, within_a_fake_kernel])
def test_a_clipper_that_is_collected_under_a_mode_writes_what_is_left(mode) -> None:
    sink, parameter = Kept(), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    clipper = GradientClipper(optimizer, 1.0, log=sink)
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    del clipper, optimizer, parameter
    with mode():
        gc.collect()
    assert [step.norm for step in sink.steps] == [5.0]


def test_sinks_hear_once_how_the_clipper_is_set():
    class Listening(Sink):
        def begin(self, settings):
            self.settings = dict(settings)

        def write(self, steps):
            raise AssertionError

    class Deaf(Listening):
        def begin(self, settings):
            raise ValueError("deaf")

    deaf, listening = Deaf(), Listening()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2)) for _ in range(3)])
    with pytest.warns(RuntimeWarning, match="Deaf failed and may miss steps: ValueError: deaf"):
        GradientClipper(optimizer, 2.5, scope="parameter", log=[deaf, listening])
    found = listening.settings
    assert (found["max_norm"], found["optimizer"], found["scope"]) == (
        "Fixed(2.5)",
        "SGD",
        "parameter",
    )
    assert found["norms"] == "3: group 0, parameter 0, group 0, parameter 1, group 0, parameter 2"
    assert found["gradclip"] == __version__
