"""A resumed run continues its curves, and nobody else's are touched."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, TensorBoardSink

IN_A_PROCESS = """
import math, sys
import torch
from torch.utils.tensorboard import SummaryWriter
from gradclip import GradientClipper

directory, state, steps, *saves = sys.argv[1:]
parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([parameter], lr=0.0)
clipper = GradientClipper(optimizer, 2.0, log=directory)
writer = SummaryWriter(directory)
if not saves:
    clipper.load_state_dict(torch.load(state, weights_only=True))
for step in range(clipper.steps, int(steps)):
    norm = math.nan if step % 10 == 9 else 4.0 if step < 40 else 1.0
    parameter.grad = torch.tensor([0.0, norm])
    optimizer.step()
    writer.add_scalar("samples", step, 100 * step)
    writer.add_scalar("epochs", step, step // 10)
    if [str(clipper.steps)] == saves:
        torch.save(clipper.state_dict(), state)
writer.flush()
clipper.flush()
if saves:
    import os
    os._exit(1)
"""


def run_in_a_process(*arguments: object) -> int:
    command = [sys.executable, "-c", IN_A_PROCESS, *map(str, arguments)]
    return subprocess.run(command, timeout=120, check=False).returncode


def check_continued(curves: dict[str, list[Any]]) -> None:
    for name in ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps"):
        assert [point.step for point in curves[f"grad_norm/{name}"]] == list(range(90)), name
    counts = [point.value for point in curves["grad_norm/nonfinite_steps"]]
    assert counts == [(step + 1) // 10 for step in range(90)]
    rates = [point.value for point in curves["grad_norm/clip_rate"]]
    finite = [1 + step - (step + 1) // 10 for step in range(90)]
    assert rates == pytest.approx([min(count, 36) / count for count in finite])


def test_a_run_that_died_continues_in_a_new_process(tmp_path: Path, read: Any) -> None:
    logs, state = tmp_path / "logs", tmp_path / "state.pt"
    assert run_in_a_process(logs, state, 70, 50) == 1
    assert [point.step for point in read(logs)["grad_norm/pre"]] == list(range(70))
    assert run_in_a_process(logs, state, 90) == 0
    curves = read(logs)
    check_continued(curves)
    # Their own curves count otherwise: TensorBoard's mark for a restart would have dropped them.
    steps = [*range(70), *range(50, 90)]
    assert [point.step for point in curves["samples"]] == [100 * step for step in steps]
    assert [point.step for point in curves["epochs"]] == [step // 10 for step in steps]


@pytest.mark.parametrize(
    "kind", ["directory", "same clipper", "not closed", "same writer", "new writer"]
)
def test_a_run_continues_in_the_same_process(
    tmp_path: Path, training: Any, read: Any, kind: str
) -> None:
    def norms(first: int, last: int) -> list[float]:
        return [
            math.nan if step % 10 == 9 else 4.0 if step < 40 else 1.0 for step in range(first, last)
        ]

    writers = [
        SummaryWriter(str(tmp_path)) for _ in range(kind.count("writer") + (kind == "new writer"))
    ]
    run = training()
    clipper = GradientClipper(run.optimizer, 2.0, log=writers[0] if writers else tmp_path)
    run.take(*norms(0, 50))
    state = clipper.state_dict()
    run.take(*norms(50, 70))
    if kind != "same clipper":
        if kind != "not closed":
            clipper.close()
        del clipper
        run = training()  # the old optimizer goes, and its clipper with it
        gc.collect()
        clipper = GradientClipper(run.optimizer, 2.0, log=writers[-1] if writers else tmp_path)
    clipper.load_state_dict(state)
    run.take(*norms(50, 90))
    clipper.close()
    for writer in writers:
        writer.close()
    check_continued(read(tmp_path))


def test_after_a_restart_a_users_points_are_left_as_they_are(
    tmp_path: Path, training: Any, read: Any
) -> None:
    """Also where they go back in a file that holds our marks."""
    for first in (0, 5):
        run = training()
        with (
            SummaryWriter(str(tmp_path)) as writer,
            GradientClipper(run.optimizer, 2.0, log=writer) as clipper,
        ):
            writer.add_scalar("before", first, 100)
            clipper.steps = first
            run.take(*[1.0] * 10)
            clipper.flush()
            for step in (20, 10):
                writer.add_scalar("after", first, step)
    curves = read(tmp_path)
    assert [point.step for point in curves["grad_norm/pre"]] == list(range(15))
    assert [point.step for point in curves["before"]] == [100, 100]
    assert [point.step for point in curves["after"]] == [20, 10, 20, 10]


def test_two_clippers_resume_at_their_own_steps(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    """As the two of a GAN, of which one steps more often."""

    def train(first: int, last: int) -> None:
        runs = training(), training()
        clippers = [GradientClipper(run.optimizer, 2.0, log=tmp_path) for run in runs]
        for run, clipper, factor in zip(runs, clippers, (1, 5), strict=True):
            clipper.steps = first * factor
            run.take(*[1.0] * (last - first) * factor)
            clipper.flush()
        for clipper in clippers:
            clipper.close()

    train(0, 7)
    train(5, 9)
    steps = read_steps(tmp_path)
    assert steps["grad_norm/pre"] == list(range(9))
    assert steps["grad_norm_2/pre"] == list(range(45))


def test_a_run_that_begins_again_replaces_the_curves(
    tmp_path: Path, training: Any, read: Any
) -> None:
    for norm, count in ((4.0, 30), (1.0, 20)):
        run = training()
        with GradientClipper(run.optimizer, 2.0, log=tmp_path):
            run.take(*[norm] * count)
    points = read(tmp_path)["grad_norm/pre"]
    assert [point.step for point in points] == list(range(20))
    assert {point.value for point in points} == {1.0}


def test_steps_set_back_within_a_batch_replace_what_follows(
    tmp_path: Path, training: Any, read: Any
) -> None:
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=tmp_path) as clipper:
        run.take(1.0, 1.0, 1.0, 1.0)
        clipper.steps = 2
        run.take(3.0)
    points = read(tmp_path)["grad_norm/pre"]
    assert [(point.step, point.value) for point in points] == [(0, 1.0), (1, 1.0), (2, 3.0)]


def test_steps_set_forward_leave_a_gap(tmp_path: Path, training: Any, read_steps: Any) -> None:
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=tmp_path) as clipper:
        run.take(1.0)
        clipper.steps = 10
        run.take(1.0)
    assert read_steps(tmp_path)["grad_norm/pre"] == [0, 10]


def test_a_run_resumes_where_it_wrote_only_some_steps(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    for first, last in ((0, 38), (23, 45)):
        run = training()
        sink = TensorBoardSink(tmp_path, every=5, flush_every=3)
        with GradientClipper(run.optimizer, 2.0, log=sink) as clipper:
            clipper.steps = first
            run.take(*[1.0] * (last - first))
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(0, 45, 5))


def test_a_first_run_writes_no_marks_of_a_restart(
    tmp_path: Path, training: Any, caplog: pytest.LogCaptureFixture, read: Any
) -> None:
    """TensorBoard says something in its log about each of them."""
    runs = training(), training()
    writer = SummaryWriter(str(tmp_path))
    clippers = [GradientClipper(run.optimizer, 2.0, log=tmp_path) for run in runs]
    for run in runs:
        run.take(1.0, 1.0)
    for clipper in clippers:
        clipper.close()
    writer.close()
    read(tmp_path)
    assert not caplog.records


def test_files_of_a_machine_whose_clock_is_ahead_come_first(
    tmp_path: Path, training: Any, read_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, ahead in ((0, 10_000), (5, 0)):
        with monkeypatch.context() as patch:
            patch.setattr("gradclip.records.sinks.tensorboard._LOADED_AT", 1_700_000_000 + ahead)
            run = training()
            with GradientClipper(run.optimizer, 2.0, log=tmp_path) as clipper:
                clipper.steps = first
                run.take(*[1.0] * 10)
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(15))


def test_a_saved_state_loads_with_weights_only(tmp_path: Path, training: Any) -> None:
    run = training()
    with GradientClipper(run.optimizer, 2.0) as clipper:
        run.take(4.0, math.nan)
        torch.save(clipper.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["counters"] == {
        "clipped": 1,
        "finite": 1,
        "nonfinite_steps": 1,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
    }
