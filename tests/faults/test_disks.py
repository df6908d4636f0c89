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
from tests.support.curves import runs_in, steps_in

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
        self.free, self.interrupts = 1 << 40, False

    def open(self, path, mode):
        disk = self

        class File(io.FileIO):
            def write(self, content):
                if disk.interrupts:
                    disk.interrupts = False
                    super().write(memoryview(content)[:100])
                    raise KeyboardInterrupt
                if not disk.free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                written = super().write(memoryview(content)[: disk.free])
                disk.free -= written
                return written

        return io.BufferedWriter(File(path, mode))


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    name = "gradclip.records.sinks.event_files.open"
    monkeypatch.setattr(name, disk.open, raising=False)
    return disk


def test_full_disk(tmp_path, training, disk):
    """Readers see what came before the end, and what was written when there was room again."""
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(tmp_path, flush_every=10))
    with warnings_of(TensorBoardSink=[f"No space left on device: '{tmp_path}"]):
        run.take(*[1.0] * 10)
        disk.free = 1000
        run.take(*[1.0] * 30)
        assert len(os.listdir(tmp_path)) == 1, "a full disk does not fill with empty files"
        for free, steps in ((1 << 40, 10), (0, 10), (1 << 40, 5)):
            disk.free = free
            run.take(*[1.0] * steps)
        clipper.close()
    steps = steps_in(tmp_path)[PRE]
    assert len(os.listdir(tmp_path)) == 3
    assert steps[:10] == [*range(10)]
    assert [step for step in steps if step >= 20] == [*range(40, 50), *range(60, 65)]
    assert steps == sorted(set(steps))


def test_disk_that_is_full_from_the_beginning(tmp_path, training, disk):
    run, sink = training(), TensorBoardSink(tmp_path, flush_every=2)
    disk.free = 20
    with (
        warnings_of(TensorBoardSink=["No space left on device"]),
        GradientClipper(run.optimizer, 1.0, log=sink),
    ):
        run.take(*[1.0] * 6)
        assert os.listdir(tmp_path) == []
        disk.free = 1 << 40
        run.take(*[1.0] * 2)
    assert steps_in(tmp_path)[PRE] == [6, 7]


def test_interrupt_within_a_write(tmp_path, training, disk):
    """Later records are written to another file: no reader gets past half a record."""
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path) as clipper:
        run.take(*[1.0] * 199)
        disk.interrupts = True
        with pytest.raises(KeyboardInterrupt):
            run.take(1.0)
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


def test_directory_below_a_file(tmp_path, training):
    run, blocking = training(), tmp_path / "file"
    blocking.write_text("in the way")
    with (
        warnings_of(
            TensorBoardSink=[f"NotADirectoryError: [Errno 20] Not a directory: '{tmp_path}"]
        ),
        GradientClipper(run.optimizer, 1.0, log=blocking / "run") as clipper,
    ):
        for _ in range(2):
            run.take(1.0)
            clipper.flush()
        blocking.unlink()
        run.take(1.0)
    assert steps_in(blocking / "run")[PRE] == [2]


@pytest.mark.parametrize("removed", ["directory", "file"])
def test_removed_logs_are_made_again(tmp_path, training, removed):
    run, directory = training(), tmp_path / "run"
    with (
        warnings_of(TensorBoardSink=[f"event file was removed, a new file goes on: '{directory}"]),
        GradientClipper(run.optimizer, 1.0, log=directory) as clipper,
    ):
        run.take(1.0, 1.0)
        clipper.flush()
        if removed == "directory":
            shutil.rmtree(directory)
        else:
            next(directory.iterdir()).unlink()
        run.take(1.0)
        clipper.flush()
        run.take(1.0)
    assert steps_in(directory)[PRE] == [2, 3]


def test_file_of_lines_whose_directory_is_removed(tmp_path, training):
    """Nobody is told: each batch opens the file anew, and none is lost after the removal."""
    run, path = training(), tmp_path / "run" / "steps.jsonl"
    with GradientClipper(run.optimizer, 1.0, log=JsonlSink(path, flush_every=2)):
        run.take(*[1.0] * 5)
        shutil.rmtree(path.parent)
        run.take(*[1.0] * 4)
    [found] = runs_in(path)
    assert found.steps.tolist() == [4, 5, 6, 7, 8]


def test_directory_that_is_moved_takes_its_curves_along(tmp_path, training):
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path / "here") as clipper:
        run.take(1.0)
        clipper.flush()
        (tmp_path / "here").rename(tmp_path / "there")
        run.take(1.0)
    assert steps_in(tmp_path / "there")[PRE] == [0, 1]
