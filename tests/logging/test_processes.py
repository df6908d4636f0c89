"""The logs of a process that has ended, however it ended."""

import subprocess
import sys

import pytest

from tests.support.curves import steps_in

PRELUDE = """
import sys, torch
from gradclip import GradientClipper

parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([parameter], lr=0.0)

def train(log):
    clipper = GradientClipper(optimizer, 1.0, log=log)
    for _ in range(7):
        parameter.grad = torch.ones(2)
        optimizer.step()
    return clipper

"""
ENDS = {
    "never bound": "train(sys.argv[1])",
    "an exception": 'clipper = train(sys.argv[1])\nraise KeyError("uncaught")',
    "an exception within with": 'with train(sys.argv[1]):\n    raise KeyError("uncaught")',
    "a writer that its user has closed": """
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter(sys.argv[1]) as writer:
    clipper = train(writer)
""",
}
QUICK, *SLOW = ENDS


@pytest.mark.parametrize(
    "end", [QUICK, *(pytest.param(end, marks=pytest.mark.slow) for end in SLOW)]
)
def test_all_steps_are_there_after(tmp_path, end):
    options = ["-W", "error", "-W", "ignore:Implicitly cleaning up:ResourceWarning"]
    command = [sys.executable, *options, "-c", PRELUDE + ENDS[end], tmp_path]
    ended = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    raises = "raise" in ENDS[end]
    assert ended.returncode == raises
    assert ended.stderr.endswith("KeyError: 'uncaught'\n" if raises else "")
    assert ended.stderr.count("Error") == raises, ended.stderr
    assert steps_in(tmp_path)["grad_norm/pre"] == [*range(7)]
