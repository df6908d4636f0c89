"""Rows of plain numbers, counted and handed to the sinks in batches.

The model of a clipper's life checks their values for every policy, order and number of norms.
"""

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, in_kernel_invocation_manager

from gradclip import GradientClipper, MemorySink, __version__
from tests.support.curves import Kept


def test_counters_go_on_from_a_state(training):
    """Without a sink, too."""
    run = training()
    with GradientClipper(run.optimizer, 1.0, nonfinite="skip") as clipper:
        assert clipper.clip_rate() == 0.0
        run.take(4.0)
        state = clipper.state_dict()
        run.take(4.0)
        state["counters"] |= {"clipped": 3, "finite": 10, "nonfinite_steps": 2}
        clipper.load_state_dict(state)
        run.take(1.0, math.nan)
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
