from __future__ import annotations

import json
import math

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import ArgumentError, GradientClipper, JsonlSink, TensorBoardSink
from gradclip.report import read_runs

NORMS = (4.0, 1.0, math.nan, 8.0, 2.0)


@pytest.fixture
def logged(tmp_path, training):
    """A run in both formats."""
    run = training()
    log = [JsonlSink(tmp_path / "a.jsonl"), TensorBoardSink(tmp_path / "a")]
    with GradientClipper(run.optimizer, 2.0, nonfinite="skip", log=log):
        run.take(*NORMS)
    return {"jsonl": tmp_path / "a.jsonl", "events": tmp_path / "a"}


@pytest.mark.parametrize("kind", ["jsonl", "events"])
def test_a_run_is_read_as_it_was_logged(logged, kind):
    [run] = read_runs([logged[kind]])
    assert run.name == str(logged[kind])
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.norms.tolist() == pytest.approx(NORMS, nan_ok=True)
    finite = [0, 1, 3, 4]
    assert run.clipped_norms[finite].tolist() == [2.0, 1.0, 2.0, 2.0]
    assert run.thresholds.tolist() == [2.0] * 5
    assert run.skipped.tolist() == [False, False, True, False, False]
    assert (len(run), run.nonfinite_steps, run.skipped_steps, run.clip_rate) == (5, 1, 1, 0.5)


def test_a_directory_is_searched_with_all_that_are_in_it(tmp_path, logged):
    writer = SummaryWriter(str(tmp_path / "b" / "of someone else"))
    writer.add_scalar("loss", 1.0, 0)
    writer.close()
    (tmp_path / "notes.txt").write_text("{}")
    assert [run.name for run in read_runs([tmp_path])] == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "a"),
    ]
    assert len(read_runs([logged["jsonl"], logged["events"]])) == 2


def test_several_clippers_in_one_directory_are_several_runs(tmp_path, training):
    one, other = training(), training()
    with (
        GradientClipper(one.optimizer, 2.0, log=tmp_path),
        GradientClipper(other.optimizer, None, log=tmp_path),
    ):
        one.take(3.0)
        other.take(5.0, 6.0)
    first, second = read_runs([tmp_path])
    assert (first.name, second.name) == (str(tmp_path), f"{tmp_path} (grad_norm_2)")
    assert (first.norms.tolist(), second.norms.tolist()) == ([3.0], [5.0, 6.0])
    assert second.clip_rate == 0


@pytest.mark.parametrize("kind", ["jsonl", "events"])
def test_of_a_resumed_run_the_later_steps_count(tmp_path, training, kind):
    where = tmp_path / "run.jsonl" if kind == "jsonl" else tmp_path / "run"
    for first, norm, count in ((0, 1.0, 6), (3, 2.0, 2), (5, 3.0, 2)):
        run = training()
        log = JsonlSink(where) if kind == "jsonl" else where
        with GradientClipper(run.optimizer, None, log=log) as clipper:
            clipper.steps = first
            run.take(*[norm] * count)
    [run] = read_runs([where])
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert run.norms.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("kind", ["jsonl", "events"])
def test_steps_that_are_skipped_again_in_a_resumed_run_are_known(tmp_path, training, kind):
    where, state = tmp_path / ("run.jsonl" if kind == "jsonl" else "run"), None
    for begin in (0, 2):
        run = training()
        log = JsonlSink(where) if kind == "jsonl" else where
        with GradientClipper(run.optimizer, None, nonfinite="skip", log=log) as clipper:
            if state is not None:
                clipper.load_state_dict(state)
            run.take(*NORMS[begin:2])
            state = state or clipper.state_dict()  # the third step is left out after it, both times
            run.take(*NORMS[2:])
    [run] = read_runs([where])
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    assert run.skipped.tolist() == [False, False, True, False, False]


def test_what_is_cut_short_is_read_up_to_there(logged):
    [file] = logged["events"].iterdir()
    whole = file.read_bytes()
    for missing in (1, 20):
        file.write_bytes(whole[:-missing])
        with pytest.warns(UserWarning, match="cut short or damaged"):
            [run] = read_runs([logged["events"]])
        assert run.steps.tolist() == [0, 1, 2, 3]
    file.write_bytes(whole[:-30] + b"?" + whole[-29:])
    with pytest.warns(UserWarning, match="cut short or damaged"):
        assert len(read_runs([file])[0]) == 4
    lines = logged["jsonl"].read_bytes()
    logged["jsonl"].write_bytes(lines[:-10])
    with pytest.warns(UserWarning, match="1 of its lines are not steps and were ignored"):
        assert len(read_runs([logged["jsonl"]])[0]) == 4


@pytest.mark.parametrize("content", [b"", b"hello\n", b"[1, 2]\n", b'{"step": 1}\n', b"\x00" * 99])
@pytest.mark.parametrize("name", ["a.jsonl", "events.out.tfevents.1.a", "notes.txt"])
def test_what_holds_no_run_is_refused(tmp_path, content, name, recwarn):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        ArgumentError, match=f"{name} has no steps in it \\({len(content)} bytes\\)"
    ):
        read_runs([path])


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="nowhere does not exist"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ArgumentError, match=r"has no run in it \(0 files\)"):
        read_runs([tmp_path])
    with pytest.raises(ArgumentError, match="No runs were given"):
        read_runs([])


def test_many_steps_are_all_there_and_in_order(tmp_path):
    path = tmp_path / "long.jsonl"
    line = {"clipped_norm": 1.0, "threshold": None, "skipped": False}
    with path.open("w") as file:
        for step in range(150_000):
            file.write(json.dumps({"step": step, "norm": step % 977 + 0.5, **line}) + "\n")
    [run] = read_runs([path])
    assert np.array_equal(run.steps, np.arange(150_000))
    assert np.array_equal(run.norms, np.arange(150_000) % 977 + 0.5)
