"""What is in the files after a process has ended, however it ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PRELUDE = """
import sys, os, signal, time
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
    "the end": """
clipper = GradientClipper(optimizer, 1.0, log=sys.argv[1])
train(7)
""",
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
}


def run(script: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore:Implicitly cleaning up:ResourceWarning",
        "-c",
        PRELUDE + script,
        str(directory),
    ]
    return subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("end", ENDS)
def test_all_steps_are_there_after(tmp_path: Path, read_steps: Any, end: str) -> None:
    ended = run(ENDS[end], tmp_path)
    raises = "raise" in ENDS[end]
    assert ended.returncode == raises
    assert ended.stderr.endswith("KeyError: 'uncaught'\n" if raises else "")
    assert ended.stderr.count("Error") == raises, ended.stderr
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(7))


@pytest.mark.slow
def test_a_users_writer_too_has_all_steps_after_the_end(tmp_path: Path, read_steps: Any) -> None:
    """Also where the user has closed it, as scripts do at their end."""
    script = """
from torch.utils.tensorboard import SummaryWriter
with SummaryWriter(sys.argv[1]) as writer:
    clipper = GradientClipper(optimizer, 1.0, log=writer)
    train(7)
"""
    ended = run(script, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(7))


def test_a_killed_process_loses_less_than_a_batch(tmp_path: Path, read_steps: Any) -> None:
    script = """
GradientClipper(optimizer, 1.0, log=TensorBoardSink(sys.argv[1], flush_every=20))
train(59)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(script, tmp_path).returncode == -signal.SIGKILL
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(40))


@pytest.mark.slow
def test_a_process_killed_at_any_moment_leaves_a_readable_file(
    tmp_path: Path, read_steps: Any
) -> None:
    script = """
GradientClipper(optimizer, 1.0, log=TensorBoardSink(sys.argv[1], flush_every=5))
train(100)
print("ready", flush=True)
while True:
    train(1)
    print(flush=True)
"""
    command = [sys.executable, "-c", PRELUDE + script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = 0
        try:
            assert process.stdout.readline() == b"ready\n"
            for _ in range(333):
                seen += process.stdout.readline() == b"\n"
        finally:
            process.kill()
        seen += process.stdout.read().count(b"\n")
    steps = read_steps(tmp_path)["grad_norm/pre"]
    assert steps == list(range(len(steps)))
    assert 100 + seen - 5 < len(steps) <= 100 + seen + 1
