"""The logs of a process that has ended, however it ended."""

import signal
import subprocess
import sys

import pytest

from tests.support.curves import steps_in

PRE = "grad_norm/pre"
PRELUDE = """
import os, signal, sys
import torch
from gradclip import GradientClipper, TensorBoardSink

parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([parameter], lr=0.0)

def train(steps):
    for _ in range(steps):
        parameter.grad = torch.ones(2)
        optimizer.step()

"""
ENDS = {
    "never bound": """
GradientClipper(optimizer, 1.0, log=sys.argv[1])
train(7)
""",
    "an exception": """
clipper = GradientClipper(optimizer, 1.0, log=sys.argv[1])
train(7)
raise KeyError("uncaught")
""",
    "an exception within with": """
with GradientClipper(optimizer, 1.0, log=sys.argv[1]):
    train(7)
    raise KeyError("uncaught")
""",
    "a writer that its user has closed": """
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter(sys.argv[1]) as writer:
    clipper = GradientClipper(optimizer, 1.0, log=writer)
    train(7)
""",
}
SLOW = {"an exception", "an exception within with", "a writer that its user has closed"}


def run_script(script, directory):
    options = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    command = [sys.executable, *options, "-c", PRELUDE + script, directory]
    return subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    "end", [pytest.param(end, marks=[pytest.mark.slow] * (end in SLOW)) for end in ENDS]
)
def test_all_steps_are_there_after(tmp_path, end):
    ended = run_script(ENDS[end], tmp_path)
    raises = "raise" in ENDS[end]
    assert ended.returncode == raises
    assert ended.stderr.endswith("KeyError: 'uncaught'\n" if raises else "")
    assert ended.stderr.count("Error") == raises, ended.stderr
    assert steps_in(tmp_path)[PRE] == [*range(7)]


def test_killed_process_loses_less_than_a_batch(tmp_path):
    script = """
GradientClipper(optimizer, 1.0, log=TensorBoardSink(sys.argv[1], flush_every=20))
train(59)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_script(script, tmp_path).returncode == -signal.SIGKILL
    assert steps_in(tmp_path)[PRE] == [*range(40)]
