"""Curves in TensorBoard: tags, values, batches, and who writes under which name."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from gradclip import ArgumentError, GradientClipper, TensorBoardSink

NAMES = ("pre", "post", "threshold", "clip_rate", "nonfinite_steps", "skipped_steps")
TAGS = {f"grad_norm/{name}" for name in NAMES}
SECOND_TAGS = {f"grad_norm_2/{name}" for name in NAMES}


def test_every_step_is_written_with_its_values_and_its_own_time(
    tmp_path: Path, training: Any, read: Any
) -> None:
    run = training()
    times = []
    with GradientClipper(run.optimizer, 2.0, log=tmp_path):
        for norm in (4.0, 1.0, math.nan, 8.0):
            begun = time.time()
            run.take(norm)
            times.append((begun, time.time()))
    curves = read(tmp_path)
    values = {tag.split("/")[1]: [point.value for point in curves[tag]] for tag in curves}
    assert set(curves) == TAGS
    assert values["pre"] == [4.0, 1.0, pytest.approx(math.nan, nan_ok=True), 8.0]
    assert values["post"] == [2.0, 1.0, 0.0, 2.0]
    assert values["threshold"] == [2.0] * 4
    assert values["clip_rate"] == pytest.approx([1.0, 0.5, 0.5, 2 / 3])
    assert values["nonfinite_steps"] == [0, 0, 1, 1]
    assert values["skipped_steps"] == [0, 0, 0, 0]
    for points in curves.values():
        assert [point.step for point in points] == [0, 1, 2, 3]
        for point, (begun, ended) in zip(points, times, strict=True):
            assert begun <= point.wall_time <= ended


def test_skipped_steps_are_counted(tmp_path: Path, training: Any, read: Any) -> None:
    run = training()
    with GradientClipper(run.optimizer, 2.0, nonfinite="skip", log=tmp_path):
        run.take(1.0, math.inf, 1.0)
    curves = read(tmp_path)
    assert [point.value for point in curves["grad_norm/skipped_steps"]] == [0, 1, 1]
    assert [point.value for point in curves["grad_norm/nonfinite_steps"]] == [0, 1, 1]


def test_without_a_threshold_there_is_no_curve_of_it(
    tmp_path: Path, training: Any, read: Any
) -> None:
    run = training()
    with GradientClipper(run.optimizer, None, log=tmp_path):
        run.take(4.0)
    assert set(read(tmp_path)) == TAGS - {"grad_norm/threshold"}


def test_a_threshold_that_comes_and_goes_is_written_where_it_is(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    run = training()
    with GradientClipper(run.optimizer, lambda step: 2.0 if step % 2 else None, log=tmp_path):
        run.take(1.0, 1.0, 1.0, 1.0)
    steps = read_steps(tmp_path)
    assert steps["grad_norm/threshold"] == [1, 3]
    assert steps["grad_norm/pre"] == [0, 1, 2, 3]


def test_batches_are_written_when_they_are_full_and_at_flush(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(tmp_path, flush_every=3)) as c:
        run.take(1.0, 1.0)
        assert os.listdir(tmp_path) == []
        run.take(1.0, 1.0)
        assert read_steps(tmp_path)["grad_norm/pre"] == [0, 1, 2]
        c.flush()
        assert read_steps(tmp_path)["grad_norm/pre"] == [0, 1, 2, 3]
        assert len(os.listdir(tmp_path)) == 1


def test_every_writes_multiples_and_counts_all(tmp_path: Path, training: Any, read: Any) -> None:
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=TensorBoardSink(tmp_path, every=10)):
        run.take(*[4.0] * 5, *[math.nan] * 5, *[1.0] * 11)
    curves = read(tmp_path)
    for points in curves.values():
        assert [point.step for point in points] == [0, 10, 20]
    assert [point.value for point in curves["grad_norm/nonfinite_steps"]] == [0, 5, 5]
    assert [point.value for point in curves["grad_norm/clip_rate"]] == [
        1.0,
        pytest.approx(5 / 6),
        0.3125,
    ]


def test_every_counts_indexes_not_batches(tmp_path: Path, training: Any, read_steps: Any) -> None:
    run = training()
    sink = TensorBoardSink(tmp_path, every=10, flush_every=3)
    with GradientClipper(run.optimizer, 2.0, log=sink) as clipper:
        clipper.steps = 7
        run.take(*[1.0] * 20)
    assert read_steps(tmp_path)["grad_norm/pre"] == [10, 20]


def test_a_norm_beyond_float32_does_not_stop_the_curve(
    tmp_path: Path, training: Any, read: Any
) -> None:
    """Scalars in event files are float32."""
    run = training()
    with GradientClipper(run.optimizer, 2.0, log=tmp_path):
        run.take(1e100, 1.0)
    assert [point.value for point in read(tmp_path)["grad_norm/pre"]] == [math.inf, 1.0]


@pytest.mark.parametrize(
    "again",
    [
        lambda path: str(path),
        lambda path: f"{path}/",
        lambda path: os.path.relpath(path),
        lambda path: path / ".." / path.name,
        lambda path: path.with_name("link"),
        lambda path: SummaryWriter(str(path)),
    ],
    ids=["same", "trailing slash", "relative", "dots", "link", "writer"],
)
def test_a_second_clipper_in_the_same_place_writes_under_a_second_name(
    tmp_path: Path, training: Any, read_steps: Any, again: Any
) -> None:
    path = tmp_path / "run"
    (tmp_path / "link").symlink_to(path)
    runs = training(), training()
    place = again(path)
    clippers = [GradientClipper(runs[0].optimizer, 1.0, log=path)]
    clippers.append(GradientClipper(runs[1].optimizer, 1.0, log=place))
    runs[0].take(1.0)
    runs[1].take(1.0, 1.0)
    clippers[0].close()
    runs[1].take(1.0)
    clippers[1].close()
    if isinstance(place, SummaryWriter):
        place.close()
    else:  # TensorBoard without its data server follows only one file in a directory
        assert len(os.listdir(path)) == 1
    steps = read_steps(path)
    assert set(steps) == TAGS | SECOND_TAGS
    assert steps["grad_norm/pre"] == [0]
    assert steps["grad_norm_2/pre"] == [0, 1, 2]


def test_two_clippers_on_one_writer_write_under_two_names(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    runs = training(), training()
    with SummaryWriter(str(tmp_path)) as writer:
        clippers = [GradientClipper(run.optimizer, 1.0, log=writer) for run in runs]
        for run in runs:
            run.take(1.0)
        for clipper in clippers:
            clipper.close()
    assert set(read_steps(tmp_path)) == TAGS | SECOND_TAGS


def test_two_directories_stay_apart(tmp_path: Path, training: Any, read_steps: Any) -> None:
    runs = {name: training() for name in ("a", "b")}
    clippers = [
        GradientClipper(run.optimizer, 1.0, log=tmp_path / name) for name, run in runs.items()
    ]
    runs["a"].take(1.0)
    runs["b"].take(1.0, 1.0)
    for clipper in clippers:
        clipper.close()
    assert read_steps(tmp_path / "a") == {tag: [0] for tag in TAGS}
    assert read_steps(tmp_path / "b") == {tag: [0, 1] for tag in TAGS}


@pytest.mark.parametrize("end", ["close", "collection"])
def test_the_name_is_free_again_after_the_end(
    tmp_path: Path, training: Any, read_steps: Any, end: str
) -> None:
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=tmp_path)
    run.take(1.0, 1.0)
    if end == "close":
        clipper.close()
    del clipper, run
    gc.collect()
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path) as clipper:
        clipper.steps = 2
        run.take(1.0)
    assert read_steps(tmp_path) == {tag: [0, 1, 2] for tag in TAGS}


def test_closing_a_sink_twice_leaves_the_next_one_its_name(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path)
    first.close()
    second = TensorBoardSink(tmp_path)
    first.close()
    assert TensorBoardSink(tmp_path)._prefix == "grad_norm_2"
    second.close()


def test_a_users_writer_stays_open_and_has_everything_after_flush(
    tmp_path: Path, training: Any, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RecordWriter.write

    def write_late(self: RecordWriter, content: bytes) -> None:
        time.sleep(0.02)  # in the writer's own thread
        write(self, content)

    monkeypatch.setattr(RecordWriter, "write", write_late)
    run = training()
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 5.0, 0)
    clipper = GradientClipper(run.optimizer, 2.0, log=writer)
    times = []
    for norm in (4.0, 1.0):
        begun = time.time()
        run.take(norm)
        times.append((begun, time.time()))
        clipper.flush()
        curves = read(tmp_path)
        assert len(curves["grad_norm/pre"]) == len(times)
    assert set(curves) == TAGS | {"loss"}
    assert [point.value for point in curves["grad_norm/pre"]] == [4.0, 1.0]
    for point, (begun, ended) in zip(curves["grad_norm/pre"], times, strict=True):
        assert begun <= point.wall_time <= ended
    run.take(3.0)
    clipper.close()
    writer.add_scalar("loss", 4.0, 1)
    writer.close()
    curves = read(tmp_path)
    assert [point.value for point in curves["grad_norm/pre"]] == [4.0, 1.0, 3.0]
    assert [point.value for point in curves["loss"]] == [5.0, 4.0]
    assert len(os.listdir(tmp_path)) == 1


def test_a_writer_that_its_user_has_closed_still_gets_the_last_steps(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    run = training()
    with (
        SummaryWriter(str(tmp_path)) as writer,
        GradientClipper(run.optimizer, 2.0, log=writer) as clipper,
    ):
        run.take(4.0)
        writer.close()
    assert read_steps(tmp_path)["grad_norm/pre"] == [0]
    clipper.close()
    writer.close()


def test_a_writer_to_no_local_directory_is_served(
    tmp_path: Path, training: Any, read_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training()
    with SummaryWriter(str(tmp_path)) as writer:
        monkeypatch.setattr(writer, "get_logdir", lambda: "s3://bucket/run")
        with GradientClipper(run.optimizer, 2.0, log=writer):
            run.take(4.0)
    assert read_steps(tmp_path)["grad_norm/pre"] == [0]


def test_a_list_logs_to_all(tmp_path: Path, training: Any, read_steps: Any) -> None:
    run = training()
    with SummaryWriter(str(tmp_path / "c")) as writer:
        log = [tmp_path / "a", TensorBoardSink(str(tmp_path / "b"), every=2), writer]
        with GradientClipper(run.optimizer, 2.0, log=log):
            run.take(1.0, 1.0)
    assert read_steps(tmp_path / "a")["grad_norm/pre"] == [0, 1]
    assert read_steps(tmp_path / "b")["grad_norm/pre"] == [0]
    assert read_steps(tmp_path / "c")["grad_norm/pre"] == [0, 1]


def test_a_relative_directory_stays_where_it_was(
    tmp_path: Path, training: Any, read_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = training()
    with GradientClipper(run.optimizer, 2.0, log="run"):
        run.take(1.0)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
    assert read_steps(tmp_path / "run")["grad_norm/pre"] == [0]


def test_our_file_comes_before_that_of_a_writer_begun_later(tmp_path: Path, training: Any) -> None:
    run = training()
    clipper = GradientClipper(run.optimizer, 2.0, log=tmp_path)
    with SummaryWriter(str(tmp_path)), clipper:
        run.take(1.0)
    assert sorted(os.listdir(tmp_path))[0].endswith("-gradclip")


@pytest.mark.parametrize("name", ["every", "flush_every"])
@pytest.mark.parametrize("number", [0, -1, 1.5, "10", True])
def test_numbers_that_cannot_be_meant_are_refused(
    tmp_path: Path, name: str, number: object
) -> None:
    with pytest.raises(ArgumentError) as caught:
        TensorBoardSink(tmp_path, **{name: number})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name} is {number!r}: give a whole number >= 1 and < 2**62."
