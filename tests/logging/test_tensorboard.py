"""Curves in TensorBoard: tags, values, files, and which sink writes under which prefix."""

import math
import os
import time
from contextlib import nullcontext

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, TensorBoardSink
from tests.support.curves import SECOND_TAGS, TAGS, curves_in, log_run, steps_in, values_in

PRE = "grad_norm/pre"


def test_values_and_times(tmp_path, training):
    """Every step is written, with its own wall time, and what is beyond float32 as infinite."""
    run, times = training(), []
    with GradientClipper(run.optimizer, 2.0, nonfinite="skip", log=tmp_path):
        for norm in (4.0, 1.0, math.inf, 8.0, 1e100):
            begin = time.time()
            run.take(norm)
            times.append((begin, time.time()))
    curves = curves_in(tmp_path)
    assert {tag: [point.value for point in points] for tag, points in curves.items()} == {
        PRE: [4.0, 1.0, math.inf, 8.0, math.inf],
        "grad_norm/post": [2.0, 1.0, math.inf, 2.0, 2.0],
        "grad_norm/threshold": [2.0] * 5,
        "grad_norm/clip_rate": pytest.approx([1.0, 0.5, 0.5, 2 / 3, 0.75]),
        "grad_norm/nonfinite_steps": [0, 0, 1, 1, 1],
        "grad_norm/skipped_steps": [0, 0, 1, 1, 1],
    }
    for points in curves.values():
        assert [point.step for point in points] == [0, 1, 2, 3, 4]
        for point, (begin, end) in zip(points, times, strict=True):
            assert begin <= point.wall_time <= end


def test_threshold(tmp_path):
    """Its curve has a point where there is a threshold, and none elsewhere."""
    log_run(tmp_path, *[1.0] * 4, max_norm=lambda step: 2.0 if step % 2 else None)
    steps = steps_in(tmp_path)
    assert (steps["grad_norm/threshold"], steps[PRE]) == ([1, 3], [0, 1, 2, 3])


AGAIN = {
    "same": str,
    "trailing slash": lambda path: f"{path}/",
    "relative": os.path.relpath,
    "dots": lambda path: path / ".." / path.name,
    "link": lambda path: path.with_name("link"),
    "writer": lambda path: SummaryWriter(str(path)),
    "same writer": lambda path: SummaryWriter(str(path)),
}


@pytest.mark.parametrize("again", AGAIN)
def test_second_clipper_in_the_same_place(tmp_path, training, again):
    """However the place is given, the second clipper writes under second prefixes."""
    path, runs = tmp_path / "run", (training(), training())
    (tmp_path / "link").symlink_to(path)
    where = AGAIN[again](path)
    with where if "writer" in again else nullcontext():
        clippers = [
            GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(place, per_parameter="all"))
            for run, place in zip(runs, (where if "same" in again else path, where), strict=True)
        ]
        runs[0].take(5.0)
        runs[1].take(1.0, 2.0)
        clippers[0].close()
        runs[1].take(3.0)
        clippers[1].close()
    # TensorBoard without its data server follows only one file in a directory.
    assert len(os.listdir(path)) == (2 if again == "writer" else 1)
    norms = {
        (PRE, "parameter_norm/group 0, parameter 0"): [5.0],
        ("grad_norm_2/pre", "parameter_norm_2/group 0, parameter 0"): [1.0, 2.0, 3.0],
    }
    values = values_in(path)
    assert set(values) == TAGS | SECOND_TAGS | {tag for tags in norms for tag in tags}
    assert all(values[tag] == needed for tags, needed in norms.items() for tag in tags)


def test_prefix_is_free_after_the_end(tmp_path):
    """Of a sink that is collected or closed; a second close does not take it from the next sink."""
    TensorBoardSink(tmp_path)
    sink = TensorBoardSink(tmp_path)
    log_run(sink, 1.0, 1.0)
    following = TensorBoardSink(tmp_path)
    sink.close()
    log_run(TensorBoardSink(tmp_path), 1.0)
    log_run(following, 1.0, first=2)
    steps = steps_in(tmp_path)
    assert (steps[PRE], steps["grad_norm_2/pre"]) == ([0, 1, 2], [0])


def test_users_writer(tmp_path, training, monkeypatch):
    """The writer stays open, and has everything after each flush, however slow its thread is."""
    write = RecordWriter.write

    def write_late(self, content):
        time.sleep(0.02)
        write(self, content)

    monkeypatch.setattr(RecordWriter, "write", write_late)
    run, writer, times = training(), SummaryWriter(str(tmp_path)), [time.time()]
    writer.add_scalar("loss", 5.0, 0)
    clipper = GradientClipper(run.optimizer, 2.0, log=writer)
    for norm in (4.0, 1.0):
        run.take(norm)
        times.append(time.time())
        clipper.flush()
        assert len(curves_in(tmp_path)[PRE]) == len(times) - 1
    run.take(3.0)
    clipper.close()
    writer.add_scalar("loss", 4.0, 1)
    writer.close()
    curves, values = curves_in(tmp_path), values_in(tmp_path)
    assert set(values) == TAGS | {"loss"}
    assert (values[PRE], values["loss"]) == ([4.0, 1.0, 3.0], [5.0, 4.0])
    for point, begin, end in zip(curves[PRE], times, times[1:], strict=False):
        assert begin <= point.wall_time <= end
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("closed", [True, False])
def test_writer_that_is_closed_or_to_no_local_directory(tmp_path, training, monkeypatch, closed):
    """The last steps reach it all the same."""
    run = training()
    with SummaryWriter(str(tmp_path)) as writer:
        if not closed:
            monkeypatch.setattr(writer, "get_logdir", lambda: "s3://bucket/run")
        with GradientClipper(run.optimizer, 2.0, log=writer):
            run.take(4.0)
            if closed:
                writer.close()
    assert steps_in(tmp_path)[PRE] == [0]


def test_relative_directory_stays_where_it_was(tmp_path, training, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = training()
    with GradientClipper(run.optimizer, 2.0, log="run"):
        run.take(1.0)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
    assert steps_in(tmp_path / "run")[PRE] == [0]


@pytest.mark.parametrize("through_the_writer", [False, True])
def test_a_reader_without_the_data_server_follows_one_file(tmp_path, training, through_the_writer):
    """The last by its name, which is the user's."""
    run, writer = training(), SummaryWriter(str(tmp_path))
    log = writer if through_the_writer else tmp_path
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    with writer, GradientClipper(run.optimizer, 1.0, log=log) as clipper:
        for _ in range(2):
            run.take(1.0)
            writer.add_scalar("loss", 1.0)
            clipper.flush()
            writer.flush()
            reader.Reload()
    assert len(reader.Scalars("loss")) == 2
    assert len(reader.Scalars(PRE)) == (2 if through_the_writer else 1)
