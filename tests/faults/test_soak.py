"""A million steps, logged: no more memory at the end than after the first, and no slower."""

import resource
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from tests.support.curves import runs_in

STEPS, BLOCK = 1_000_000, 1_000
FLAT = 4 << 20
"""Bytes by which memory may differ: what allocators keep."""
SLOWER = 1.5


class Idle(torch.optim.Optimizer):
    """Calls its hooks and nothing else, so that a million steps are soon taken."""

    def step(self):
        for hooks in (self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks):
            for hook in [*hooks.values()]:
                hook(self, (self,), {})

    step.hooked = True  # or torch calls them as well, within its profiler


def resident():
    """Return how many bytes of memory this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc")
def test_a_million_steps(tmp_path):
    """Memory after a tenth against the end; medians of the time of 100 blocks then and then.

    The norm rises and falls, so that steps are clipped, and some are spikes, which are logged, too.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, times, early = Idle([parameter], {}), [], 0
    paths = events, lines = tmp_path / "events", tmp_path / "steps.jsonl"
    log = [TensorBoardSink(events, every=50), JsonlSink(lines, every=50)]
    with GradientClipper(optimizer, 1.0, log=log) as clipper:
        parameter.grad = torch.ones(1)
        for block in range(STEPS // BLOCK):
            parameter.grad.fill_(0.5 + block % 2)  # clipped to 1, which fits
            begin = time.process_time()
            for _ in range(BLOCK):
                optimizer.step()
            times.append(time.process_time() - begin)
            if block == STEPS // BLOCK // 10:
                early = resident()
        grown = resident() - early
        assert clipper.steps == STEPS
    assert grown < FLAT
    assert median(times[-100:]) < SLOWER * median(times[10:110])
    for path in paths:
        [run] = runs_in(path)
        assert {*run.steps.tolist()} >= {*range(0, STEPS, 50)}
