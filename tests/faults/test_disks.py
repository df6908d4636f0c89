"""A log that cannot be written is reported once, and goes on when it can be written again."""

import errno
import io
import os
import resource
import shutil
import warnings
from contextlib import contextmanager

import pytest
import torch

from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from tests.faults.lives import LoggedTraining, sinks
from tests.support.curves import log_run, runs_in, steps_in, texts_in

PRE = "grad_norm/pre"


@contextmanager
def warnings_of(**matches):
    """Check that some sinks warn, once each, that their texts match, and that nobody else warns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = sorted(str(w.message) for w in caught if w.category is RuntimeWarning)
    assert len(texts) == len(caught) == len(matches), [str(w.message) for w in caught]
    for text, (sink, needed) in zip(texts, sorted(matches.items()), strict=True):
        assert text.startswith(f"{sink} failed and may miss steps: "), text
        assert any(words in text for words in needed), text


class Disk:
    """A disk with so many bytes free; a write that meets its end is cut off there."""

    def __init__(self):
        self.free, self.error = 1 << 40, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, path, mode, buffering=-1):
        disk = self

        class File(io.FileIO):
            def write(self, content):
                if not disk.free:
                    raise disk.error
                written = super().write(memoryview(content)[: disk.free])
                disk.free -= written
                return written

        return io.BufferedWriter(File(path, mode)) if buffering else File(path, mode)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    for module in ("event_files", "jsonl"):
        monkeypatch.setattr(f"gradclip.records.sinks.{module}.open", disk.open, raising=False)
    return disk


def test_line_that_is_cut_short(tmp_path, disk):
    disk.free = 20
    with warnings_of(JsonlSink=["not all of the lines were written; is the disk full?"]):
        log_run(JsonlSink(tmp_path / "steps.jsonl"), 1.0)


def test_full_disk(tmp_path, training, disk):
    """Readers see what came before the end, and what was written when there was room again."""
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(tmp_path, flush_every=10))
    with warnings_of(TensorBoardSink=[f"No space left on device: '{tmp_path}"]):
        disk.free = 20
        run.take(*[1.0] * 10)
        assert os.listdir(tmp_path) == [], "a full disk does not fill with empty files"
        for files, free, steps in ((1, 1 << 40, 10), (1, 1000, 30), (2, 1 << 40, 10), (2, 0, 10)):
            disk.free = free
            run.take(*[1.0] * steps)
            assert len(os.listdir(tmp_path)) == files
        disk.free = 1 << 40
        run.take(*[1.0] * 5)
        clipper.close()
    steps = steps_in(tmp_path)[PRE]
    assert len(os.listdir(tmp_path)) == 3
    assert steps[:10] == [*range(10, 20)]
    assert [step for step in steps if step >= 30] == [*range(50, 60), *range(70, 75)]
    assert steps == sorted(set(steps))
    assert [*texts_in(tmp_path, "grad_norm/settings")] == [10, 50, 70], "each file has them"


def test_interrupt_within_a_write(tmp_path, training, disk):
    """Later records are written to another file: no reader gets past half a record."""
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path) as clipper:
        run.take(*[1.0] * 199)
        disk.free, disk.error = 100, KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            run.take(1.0)
        disk.free = 1 << 40
        clipper.steps = 200
        run.take(*[1.0] * 100)
    assert steps_in(tmp_path)[PRE][-100:] == [*range(200, 300)]


def write_up_to_a_limit(folder):
    """Train while files may not grow beyond a size, as with a quota, and go on without a limit."""
    endless = resource.RLIM_INFINITY
    life, alone = LoggedTraining(*sinks(folder, 10)), LoggedTraining()
    cut_off = ["is the disk full?", "File too large"]
    with warnings_of(JsonlSink=cut_off, TensorBoardSink=["File too large"]):
        for limit, steps in ((endless, 10), (4000, 30), (endless, 15)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, endless))
            for _ in range(steps):
                life.step()
                alone.step()
        life.clipper.close()
    assert torch.equal(life.weight, alone.weight)
    assert repr(life.clipper.state_dict()) == repr(alone.clipper.state_dict())


def test_write_that_the_system_refuses(tmp_path, children):
    """Python sees OSError, and the file is cut off; the training goes on as without a log."""
    children.run(write_up_to_a_limit, tmp_path)
    steps, whole = steps_in(tmp_path / "events")[PRE], {*range(10), *range(40, 55)}
    assert steps == sorted(set(steps))
    assert {*steps} >= whole
    with pytest.warns(UserWarning, match="1 of its lines are not steps"):
        [run] = runs_in(tmp_path / "steps.jsonl")
    assert {*run.steps.tolist()} >= whole


def put_a_file_in_the_way(directory):
    shutil.rmtree(directory)
    directory.write_text("in the way")


REMOVED = "event file was removed, a new file goes on"


@pytest.mark.parametrize(
    ("disturb", "warned", "place", "needed"),
    [
        (shutil.rmtree, REMOVED, "run", [2, 3]),
        (lambda place: next(place.iterdir()).unlink(), REMOVED, "run", [2, 3]),
        (lambda place: place.rename(place.with_name("moved")), None, "moved", [0, 1, 2, 3]),
        (put_a_file_in_the_way, "FileExistsError", "run", [3]),
    ],
)
def test_logs_that_are_removed_or_moved(tmp_path, training, disturb, warned, place, needed):
    """They are made again where they were; a directory that is moved takes its curves along."""
    run, directory = training(), tmp_path / "run"
    with (
        warnings_of(**({"TensorBoardSink": [warned]} if warned else {})),
        GradientClipper(run.optimizer, 1.0, log=directory) as clipper,
    ):
        run.take(1.0, 1.0)
        clipper.flush()
        disturb(directory)
        run.take(1.0)
        clipper.flush()
        if directory.is_file():
            directory.unlink()
        run.take(1.0)
    assert steps_in(tmp_path / place)[PRE] == needed


def test_file_of_lines_whose_directory_is_removed(tmp_path, training):
    """Nobody is told: each batch opens the file anew, and none is lost after the removal."""
    run, path = training(), tmp_path / "run" / "steps.jsonl"
    with GradientClipper(run.optimizer, 1.0, log=JsonlSink(path, flush_every=2)):
        run.take(*[1.0] * 5)
        shutil.rmtree(path.parent)
        run.take(*[1.0] * 4)
    [found] = runs_in(path)
    assert found.steps.tolist() == [4, 5, 6, 7, 8]
