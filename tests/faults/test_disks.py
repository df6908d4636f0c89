"""A log that cannot be written is reported once, and goes on when it can be written again."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from gradclip.records.sinks import event_files
from gradclip.report import read_runs
from tests.faults.lives import Life, sinks
from tests.support.curves import steps_in


@contextmanager
def warnings_of(*sinks: str) -> Iterator[list[str]]:
    """Check that each of some sinks warns once, and nobody else; give the texts by their names."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += sorted(str(w.message) for w in caught if w.category is RuntimeWarning)
    assert len(texts) == len(caught) == len(sinks), [str(w.message) for w in caught]
    for text, sink in zip(texts, sorted(sinks), strict=True):
        assert text.startswith(f"{sink} failed and may miss steps: "), text


@contextmanager
def one_warning(*matches: str) -> Iterator[None]:
    with warnings_of("TensorBoardSink") as texts:
        yield
    for match in matches:
        assert match in texts[0]


class Disk:
    """A disk with so many bytes free; a write that meets its end is cut off there."""

    def __init__(self) -> None:
        self.free = 1 << 40

    def open(self, path: str, mode: str) -> io.BufferedWriter:
        disk = self

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                if not disk.free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
                written = super().write(memoryview(content)[: disk.free])
                disk.free -= written
                return written

        return io.BufferedWriter(File(path, mode))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(event_files, "open", disk.open, raising=False)
    return disk


def test_a_full_disk(tmp_path, training, disk):
    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(tmp_path, flush_every=10))
    with one_warning("No space left on device", str(tmp_path)):
        run.take(*[1.0] * 10)
        disk.free = 1000
        run.take(*[1.0] * 30)
        assert len(os.listdir(tmp_path)) == 1, "a full disk does not fill with empty files"
        disk.free = 1 << 40
        run.take(*[1.0] * 10)
        disk.free = 0
        run.take(*[1.0] * 10)
        disk.free = 1 << 40
        run.take(*[1.0] * 5)
        clipper.close()
    # Of the batch that met the full disk, readers see what came before the end.
    steps = steps_in(tmp_path)["grad_norm/pre"]
    assert len(os.listdir(tmp_path)) == 3
    assert steps[:10] == list(range(10))
    assert [step for step in steps if step >= 20] == [*range(40, 50), *range(60, 65)]
    assert steps == sorted(set(steps))


def test_a_disk_that_is_full_from_the_beginning(tmp_path, training, disk):
    run = training()
    disk.free = 20
    with (
        one_warning("No space left on device"),
        GradientClipper(run.optimizer, 1.0, log=TensorBoardSink(tmp_path, flush_every=2)),
    ):
        run.take(*[1.0] * 6)
        assert os.listdir(tmp_path) == []
        disk.free = 1 << 40
        run.take(*[1.0] * 2)
    assert steps_in(tmp_path)["grad_norm/pre"] == [6, 7]


def test_interrupt_within_a_write_leaves_no_half_record_before_others(
    tmp_path, training, monkeypatch
):
    class File(io.FileIO):
        def write(self, content: Any) -> int:
            if run.interrupts:
                run.interrupts = False
                super().write(memoryview(content)[:100])
                raise KeyboardInterrupt
            return super().write(content)

    def interrupted(path: str, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(File(path, mode))

    monkeypatch.setattr(event_files, "open", interrupted, raising=False)
    run = training()
    run.interrupts = False
    with GradientClipper(run.optimizer, 1.0, log=tmp_path) as clipper:
        run.take(*[1.0] * 199)
        run.interrupts = True
        with pytest.raises(KeyboardInterrupt):
            run.take(1.0)
        clipper.steps = 200
        run.take(*[1.0] * 100)
    assert steps_in(tmp_path)["grad_norm/pre"][-100:] == list(range(200, 300))


def write_up_to_a_limit(folder: Path) -> None:
    """Train while files may not grow beyond a size, as with a quota, and go on without a limit."""
    endless = resource.RLIM_INFINITY
    life = Life(*sinks(folder, 10))
    with warnings_of("JsonlSink", "TensorBoardSink") as texts:
        for limit, steps in ((endless, 10), (4000, 30), (endless, 15)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, endless))
            for _ in range(steps):
                life.step()
        life.clipper.close()
    assert any(found in texts[0] for found in ("is the disk full?", "File too large"))
    assert "File too large" in texts[1]


def test_a_write_that_the_system_refuses(tmp_path, children):
    """With a limit on the size of files, as a quota: Python sees OSError, the file is cut off."""
    children.run(write_up_to_a_limit, tmp_path)
    steps = steps_in(tmp_path / "events")["grad_norm/pre"]
    assert steps == sorted(set(steps))
    assert set(steps) >= {*range(10), *range(40, 55)}
    with pytest.warns(UserWarning, match="1 of its lines are not steps and were ignored"):
        [run] = read_runs([tmp_path / "steps.jsonl"])
    assert {*run.steps.tolist()} >= {*range(10), *range(40, 55)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    """A disk that fills while training, with the logs themselves, and has room again later."""
    (small_disk / "ballast").write_bytes(bytes(32 << 10))
    life, alone = Life(*sinks(small_disk, 10)), Life()
    with warnings_of("JsonlSink", "TensorBoardSink") as texts:
        for _ in range(200):
            life.step()
        assert shutil.disk_usage(small_disk).free == 0
        (small_disk / "ballast").unlink()
        for _ in range(15):
            life.step()
        life.clipper.close()
    assert any(found in texts[0] for found in ("is the disk full?", "No space left on device"))
    assert "No space left on device" in texts[1]
    for _ in range(215):
        alone.step()
    assert torch.equal(life.weight, alone.weight)
    assert repr(life.clipper.state_dict()) == repr(alone.clipper.state_dict())

    steps = steps_in(small_disk / "events")["grad_norm/pre"]
    assert steps == sorted(set(steps))
    assert set(steps) >= {*range(10), *range(200, 215)}
    with pytest.warns(UserWarning, match="of its lines are not steps and were ignored"):
        [run] = read_runs([small_disk / "steps.jsonl"])
    assert {*run.steps.tolist()} >= {*range(10), *range(200, 215)}


def test_a_directory_below_a_file(tmp_path, training):
    run = training()
    blocking = tmp_path / "file"
    blocking.write_text("in the way")
    directory = blocking / "run"
    with (
        one_warning("NotADirectoryError", str(directory)),
        GradientClipper(run.optimizer, 1.0, log=directory) as clipper,
    ):
        run.take(1.0, 1.0)
        clipper.flush()
        run.take(1.0)
        clipper.flush()
        blocking.unlink()
        run.take(1.0)
    assert steps_in(directory)["grad_norm/pre"] == [3]


@pytest.mark.parametrize("removed", ["directory", "file"])
def test_what_is_removed_while_training_is_made_again(tmp_path, training, removed):
    run = training()
    directory = tmp_path / "run"
    with (
        one_warning("event file was removed", str(directory)),
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
    assert steps_in(directory)["grad_norm/pre"] == [2, 3]


def test_a_file_of_lines_whose_directory_is_removed_is_made_again(tmp_path, training):
    """Nobody is told: each batch opens the file anew, and none is lost after the removal."""
    run, path = training(), tmp_path / "run" / "steps.jsonl"
    with GradientClipper(run.optimizer, 1.0, log=JsonlSink(path, flush_every=2)):
        run.take(*[1.0] * 5)
        shutil.rmtree(path.parent)
        run.take(*[1.0] * 4)
    [found] = read_runs([path])
    assert found.steps.tolist() == [4, 5, 6, 7, 8]


def test_a_directory_that_is_moved_takes_its_curves_along(tmp_path, training):
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path / "here") as clipper:
        run.take(1.0)
        clipper.flush()
        (tmp_path / "here").rename(tmp_path / "there")
        run.take(1.0)
    assert steps_in(tmp_path / "there")["grad_norm/pre"] == [0, 1]
