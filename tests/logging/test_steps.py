"""Rows of plain numbers, counted and handed to the sinks in batches."""

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from unittest.mock import ANY

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager

from gradclip import ArgumentError, GradientClipper, LoggedStep, MemorySink, __version__
from tests.support.curves import Kept, log_named, log_run

NAN, INF = math.nan, math.inf


def logged_rows(*steps, log=log_run, **options):
    """Return the rows of steps with these norms."""
    sink = MemorySink()
    log(sink, *steps, **{"max_norm": 1.0, **options})
    return sink.steps


def test_row_of_one_norm():
    [row] = logged_rows(4.0)
    numbers = {"norm": 4.0, "clipped_norm": 1.0, "threshold": 1.0, "coefficient": 0.25}
    counts = {"clip_rate": 1.0, "nonfinite_steps": 0, "skipped_steps": 0}
    assert row == LoggedStep(0, ANY, **numbers, nonfinite=False, skipped=False, **counts)
    kinds = [int] + [float] * 5 + [bool] * 2 + [float] + [int] * 2 + [type(None)] * 2
    assert [*map(type, row)] == kinds


@pytest.mark.parametrize(
    ("order", "before", "after"),
    [(2.0, 7.0, math.sqrt(1 + 9 + 9)), (1.0, 11.0, 7.0), (INF, 6.0, 3.0)],
)
def test_row_of_several_norms(order, before, after):
    """The totals are in the order of the norms."""
    options = {"limits": (1.0, 5.0, 3.0), "norm_type": order}
    [row] = logged_rows("abc", (2.0, 3.0, 6.0), log=log_named, **options)
    assert (row.norm, row.clipped_norm) == pytest.approx((before, after), rel=1e-15)
    assert row.threshold is None, "there is more than one"
    assert (row.coefficient, row.clip_rate) == (0.5, 2 / 3)


@pytest.mark.parametrize("policy", ["zero", "skip"])
def test_norms_that_are_not_finite(policy):
    """They are counted apart and enter no rate, which is 0 before the first finite norm."""
    rows, skips = logged_rows(NAN, 4.0, INF, 1.0, nonfinite=policy), policy == "skip"
    assert [row.norm for row in rows] == pytest.approx([NAN, 4.0, INF, 1.0], nan_ok=True)
    assert [row.clip_rate for row in rows] == [0.0, 1.0, 1.0, 0.5]
    assert [row.nonfinite for row in rows] == [True, False, True, False]
    assert [row.nonfinite_steps for row in rows] == [1, 1, 2, 2]
    assert [row.skipped for row in rows] == [skips, False, skips, False]
    assert [row.skipped_steps for row in rows] == [skips, skips, 2 * skips, 2 * skips]
    if policy == "zero":
        assert [row.clipped_norm for row in rows] == [0.0, 1.0, 0.0, 1.0]
    [row] = logged_rows("ab", (NAN, 2.0), log=log_named, limits=(1.0, 1.0))
    assert (row.nonfinite, row.nonfinite_steps, row.clip_rate) == (True, 1, 1.0)
    assert (row.clipped_norm, row.coefficient) == (1.0, 0.0)


@pytest.mark.parametrize("log", [None, MemorySink()], ids=["no sink", "a sink"])
def test_counters_go_on_from_a_state(training, log):
    run = training()
    with GradientClipper(run.optimizer, 1.0, nonfinite="skip", log=log) as clipper:
        assert clipper.clip_rate() == 0.0
        run.take(4.0)
        state = clipper.state_dict()
        assert (state["counters"]["clipped"], state["counters"]["finite"]) == (1, 1)
        run.take(4.0)
        state["counters"] |= {"clipped": 3, "finite": 10, "nonfinite_steps": 2}
        clipper.load_state_dict(state)
        run.take(1.0, NAN)
        counts = {"clipped": 3, "finite": 11, "nonfinite_steps": 3}
        skips = {"skipped_steps": 1, "skipped_in_a_row": 1}
        assert clipper.state_dict()["counters"] == counts | skips


def test_surroundings_do_not_enter_the_numbers(training):
    """Default dtype and device, and autocast, where a batch is counted."""
    rows = []
    for surrounded in (False, True):
        run, sink = training(), MemorySink()
        with GradientClipper(run.optimizer, 0.3, log=sink) as clipper:
            run.take(1e30, 5.0)
            if surrounded:
                torch.set_default_dtype(torch.float16)
                try:
                    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
                        clipper.flush()
                finally:
                    torch.set_default_dtype(torch.float32)
        rows.append([step._replace(wall_time=0.0) for step in sink.steps])
    assert rows[0] == rows[1]


def test_batches(training):
    """They have the length of the smallest flush_every; close writes the rest, once."""
    run, often, seldom = training(), Kept(flush_every=2), Kept(flush_every=5)
    with GradientClipper(run.optimizer, 1.0, log=[seldom, often]) as clipper:
        run.take(*[1.0] * 5)
        assert often.batches == seldom.batches == [[0, 1], [2, 3]]
    clipper.close()
    clipper.flush()
    assert often.batches == seldom.batches == [[0, 1], [2, 3], [4]]
    assert often.calls == ["begin", "write", "write", "write", "flush", "close"]
    assert clipper.state_dict()["counters"]["finite"] == 5


@pytest.mark.parametrize("flush_every", [0, -1, 2.0, "10", None, True])
def test_invalid_flush_every_is_refused(training, flush_every):
    with pytest.raises(ArgumentError) as caught:
        GradientClipper(training().optimizer, 1.0, log=Kept(flush_every=flush_every))
    needed = f"Kept.flush_every is {flush_every!r}: give a whole number >= 1 and < 2**62."
    assert str(caught.value) == needed


@contextmanager
def within_a_fake_kernel():
    """As torch.compile is where it asks a kernel for the shape of its result."""
    with FakeTensorMode() as mode, enable_python_dispatcher(), in_kernel_invocation_manager(mode):
        yield


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode, within_a_fake_kernel])
def test_collected_clipper_writes_the_rest(training, mode):
    """Under a mode, too, that takes every operation of the thread which collects it."""
    run, sink = training(), Kept()
    clipper = weakref.ref(GradientClipper(run.optimizer, 1.0, log=sink))
    run.take(5.0)
    gc.collect()
    assert clipper() is not None, "the optimizer holds it"
    del run
    with mode():
        gc.collect()
    assert clipper() is None
    assert [step.norm for step in sink.steps] == [5.0]
    assert sink.calls == ["begin", "write", "flush", "close"]


def test_sinks_get_the_settings_once():
    """Also behind one that fails there."""

    def fail():
        raise ValueError("deaf")

    listening = Kept()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2)) for _ in range(3)])
    with pytest.warns(RuntimeWarning, match="Kept failed and may miss steps: ValueError: deaf"):
        GradientClipper(optimizer, 2.5, scope="parameter", log=[Kept(fail, "begin"), listening])
    names = ", ".join(f"group 0, parameter {index}" for index in range(3))
    options = {"max_norm": "Fixed(2.5)", "optimizer": "SGD", "scope": "parameter"}
    needed = {**options, "norms": f"3: {names}", "gradclip": __version__}
    assert listening.settings.items() >= needed.items()
