"""The demo from beginning to end: with few steps, and in full where marked slow."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys

import pytest
import torch

from gradclip.cli.demo.options import CELLS, LOG_SUFFIX
from gradclip.cli.demo.progress import Lines
from gradclip.cli.demo.task import seeded_model
from gradclip.cli.main import main

TAGS = {
    "loss",
    "grad_norm/pre",
    "grad_norm/post",
    "grad_norm/threshold",
    "grad_norm/clip_rate",
    "grad_norm/nonfinite_steps",
    "grad_norm/skipped_steps",
    *(f"parameter_norm/{name}" for name, _ in seeded_model("rnn-tanh", 9, 0).named_parameters()),
}


def values(points):
    return [value for _, value in points]


# What it writes


def test_both_runs_are_logged_with_every_step(demo):
    done = demo(steps=5)
    assert done.code == 0
    for run in (done.unclipped, done.clipped):
        assert run.keys() == TAGS
        assert {tag: [step for step, _ in points] for tag, points in run.items()} == {
            tag: [0, 1, 2, 3, 4] for tag in TAGS
        }
        assert set(values(run["grad_norm/threshold"])) == {1.0}


def test_the_first_run_only_observes(demo):
    one, other = (demo("--max-norm", limit, folder=limit) for limit in ("0.01", "1e9"))
    assert one.unclipped["loss"] == other.unclipped["loss"]
    # What is logged as the norm afterwards is what clipping would have made of it.
    assert values(one.unclipped["grad_norm/post"]) == pytest.approx([0.01] * 3)


def test_the_second_run_clips(demo):
    done = demo("--max-norm", "0.01")
    assert values(done.clipped["grad_norm/post"]) == pytest.approx([0.01] * 3)
    assert done.clipped["loss"][1:] != done.unclipped["loss"][1:]


def test_both_runs_start_from_the_same_weights_and_batch(demo):
    done = demo(steps=1)
    assert done.unclipped["loss"] == done.clipped["loss"]
    assert done.unclipped["grad_norm/pre"] == done.clipped["grad_norm/pre"]


def test_a_threshold_of_0_learns_nothing(demo):
    done = demo("--max-norm", "0", picture=True)
    assert done.code == 0
    assert values(done.clipped["grad_norm/post"]) == [0.0] * 3


def test_a_threshold_that_is_never_reached_makes_both_runs_alike(demo):
    done = demo("--max-norm", "1e9")
    assert done.unclipped["loss"] == done.clipped["loss"]


def test_everything_lies_in_the_folder(demo, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = demo(picture=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert not list((tmp_path / "elsewhere").iterdir())
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "clipped",
        "demo.png",
        "unclipped",
    ]
    for run in ("unclipped", "clipped"):
        [events] = (done.folder / run).iterdir()
        assert events.name.endswith(LOG_SUFFIX)


def test_the_folder_is_demo_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "1"]) == 0
    assert (tmp_path / "demo/demo.png").exists()


# What it prints


def test_it_prints_a_table_and_where_everything_is(demo):
    done = demo()
    for word in ("final loss", "largest norm", "clip rate", "steps/s"):
        assert word in done.out
    assert "without clipping" in done.out
    assert "with clipping" in done.out
    assert f"Picture: {done.folder / 'demo.png'}\n" in done.out
    assert f" --logdir {shlex.quote(str(done.folder))}\n" in done.out


def test_it_prints_the_path_of_tensorboard_where_the_shell_lacks_it(demo, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [line] = [line for line in demo(steps=1).out.splitlines() if line.startswith("Curves:")]
    [tensorboard, *_] = shlex.split(line.removeprefix("Curves:"))
    assert os.path.isabs(tensorboard)
    assert os.access(tensorboard, os.X_OK)


def test_tensorboard_on_the_path_is_called_by_its_name(demo, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tensorboard").write_text("#!/bin/sh\n")
    (tmp_path / "bin/tensorboard").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "Curves:  tensorboard --logdir" in demo(steps=1).out


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_learns_something_with_clipping(demo, cell):
    done = demo("--cell", cell, steps=8)
    assert done.code == 0
    assert cell in done.out
    losses = values(done.clipped["loss"])
    assert min(losses) < losses[0] - 0.3


def test_a_run_that_ends_in_nan_is_shown_as_such(demo, monkeypatch, png_size):
    # With weights so large the first step already overflows.
    monkeypatch.setattr("gradclip.cli.demo.task.GAIN", 1e6)
    done = demo("--cell", "rnn-relu", picture=True)
    assert done.code == 0
    assert math.isnan(done.unclipped["loss"][-1][1])
    assert "NaN" in done.out
    assert "NaN/inf" in done.out
    assert png_size(done.folder / "demo.png") == (900, 600)


# The extra


def test_without_matplotlib_it_says_what_to_install(demo, hide):
    hide("matplotlib")
    done = demo(picture=True)
    assert done.code == 0
    assert 'pip install "gradclip[report]"' in done.out
    assert "┃" in done.out
    assert not (done.folder / "demo.png").exists()


def test_without_matplotlib_an_earlier_picture_is_called_so(demo, hide):
    demo(picture=True)
    hide("matplotlib")
    done = demo(picture=True)
    assert f"({done.folder / 'demo.png'} is of an earlier demo)" in done.out


def test_without_rich_it_draws_and_prints_all_the_same(demo, hide):
    hide("rich")
    done = demo(picture=True)
    assert done.code == 0
    assert "final loss" in done.out
    assert "┃" not in done.out
    assert "pip install" not in done.out
    assert (done.folder / "demo.png").exists()


# Repeating it


def test_the_same_seed_gives_the_same_numbers(demo):
    one = demo(folder="one", steps=12)
    torch.manual_seed(7)
    torch.rand(5)
    other = demo(folder="other", steps=12)
    assert one.unclipped == other.unclipped
    assert one.clipped == other.clipped


def test_the_number_of_threads_changes_nothing(demo):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = demo(folder="one", steps=12)
        torch.set_num_threads(3)
        other = demo(folder="other", steps=12)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert one.unclipped == other.unclipped


def test_another_seed_gives_other_numbers(demo):
    one, other = demo(folder="one"), demo("--seed", "5", folder="other")
    assert one.clipped["loss"] != other.clipped["loss"]


def test_random_numbers_of_the_caller_go_on(demo):
    state = torch.get_rng_state()
    demo()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_demo_replaces_the_logs_of_the_first(demo):
    demo(steps=6)
    done = demo(steps=4)
    for run, points in (("unclipped", done.unclipped), ("clipped", done.clipped)):
        assert len(list((done.folder / run).iterdir())) == 1
        assert [step for step, _ in points["loss"]] == [0, 1, 2, 3]


def test_a_second_demo_leaves_other_files_alone(demo):
    folder = demo(steps=1).folder
    theirs = [
        folder / name
        for name in (
            "notes.txt",
            "events.out.tfevents.1.host.2.3",
            f"events.out.tfevents.1.host.2.3{LOG_SUFFIX}",
            "unclipped/events.out.tfevents.1.host.2.3",
            "clipped/events.out.tfevents.1.host.2.3.v2",
            f"clipped/mine{LOG_SUFFIX}",
            "clipped/demo.png",
            f"mine/events.out.tfevents.1.host.2.3{LOG_SUFFIX}",
        )
    ]
    (folder / "mine").mkdir()
    for path in theirs:
        path.write_text("theirs")
    assert demo(steps=1).code == 0
    assert {path.read_text() for path in theirs} == {"theirs"}
    assert len(list((folder / "unclipped").iterdir())) == 2


def test_a_folder_with_glob_characters_is_cleared_too(demo):
    demo(steps=1, folder="[a]*")
    done = demo(steps=1, folder="[a]*")
    assert len(list((done.folder / "clipped").iterdir())) == 1


# Stopping it


def test_an_interrupt_leaves_the_logs_so_far(demo, monkeypatch):
    advance, seen = Lines.advance, []

    def interrupted(self, loss):
        advance(self, loss)
        seen.append(loss)
        if len(seen) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Lines, "advance", interrupted)
    done = demo(steps=5)
    assert done.code == 130
    assert done.err.splitlines()[-1] == (
        f"gradclip demo: interrupted; what was logged until then is in {done.folder}"
    )
    assert len(done.unclipped["loss"]) == len(done.unclipped["grad_norm/pre"]) == 5
    assert len(done.clipped["loss"]) == len(done.clipped["grad_norm/pre"]) == 2


def test_a_disk_that_fills_up_ends_it_with_a_line(demo, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    done = demo()
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("gradclip demo: stopped, for lack of room")
    assert "No space left on device" in done.err


# In full


@pytest.mark.slow
def test_the_default_demo_shows_what_clipping_is_for(tmp_path, read_scalars, png_size):
    command = [sys.executable, "-W", "error", "-m", "gradclip", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    unclipped, clipped = (read_scalars(tmp_path / "demo" / run) for run in ("unclipped", "clipped"))
    assert len(unclipped["loss"]) == len(clipped["loss"]) == 300
    last = [values(run["loss"])[-10:] for run in (unclipped, clipped)]
    assert sum(last[0]) / 10 > 1.25 * sum(last[1]) / 10
    assert sum(last[1]) / 10 < 2.5
    assert max(values(unclipped["grad_norm/pre"])) > 10  # more or less by the processor
    assert max(values(clipped["grad_norm/post"])) <= 1 + 1e-6
    assert png_size(tmp_path / "demo/demo.png") == (900, 600)
