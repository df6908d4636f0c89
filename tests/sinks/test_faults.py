"""A log that cannot be written is reported once, and goes on when it can be written again."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gradclip import GradientClipper, LoggedStep, Sink, TensorBoardSink
from gradclip.sinks import event_files


@contextmanager
def one_warning(*matches: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(texts) == len(caught) == 1, texts
    assert texts[0].startswith("TensorBoardSink failed and may miss steps: ")
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


def test_a_full_disk(tmp_path: Path, training: Any, read_steps: Any, disk: Disk) -> None:
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
    steps = read_steps(tmp_path)["grad_norm/pre"]
    assert len(os.listdir(tmp_path)) == 3
    assert steps[:10] == list(range(10))
    assert [step for step in steps if step >= 20] == [*range(40, 50), *range(60, 65)]
    assert steps == sorted(set(steps))


def test_a_disk_that_is_full_from_the_beginning(
    tmp_path: Path, training: Any, read_steps: Any, disk: Disk
) -> None:
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
    assert read_steps(tmp_path)["grad_norm/pre"] == [6, 7]


def test_an_interrupt_within_a_write_leaves_no_half_record_before_others(
    tmp_path: Path, training: Any, read_steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert read_steps(tmp_path)["grad_norm/pre"][-100:] == list(range(200, 300))


LIMITED = """
import resource, sys, warnings
import torch
from gradclip import GradientClipper, TensorBoardSink

warnings.simplefilter("always")
parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.SGD([parameter], lr=0.0)
GradientClipper(optimizer, 1.0, log=TensorBoardSink(sys.argv[1], flush_every=10))
for limit, steps in ((resource.RLIM_INFINITY, 10), (4000, 30), (resource.RLIM_INFINITY, 15)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for _ in range(steps):
        parameter.grad = torch.ones(2)
        optimizer.step()
"""


@pytest.mark.slow
def test_a_write_that_the_system_refuses(tmp_path: Path, read_steps: Any) -> None:
    """With a limit on the size of files, as a quota: Python sees OSError, the file is cut off."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run")]
    done = subprocess.run(command, timeout=120, check=True, capture_output=True, text=True)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "File too large" in done.stderr
    steps = read_steps(tmp_path / "run")["grad_norm/pre"]
    assert steps == sorted(set(steps))
    assert set(steps) >= {*range(10), *range(40, 55)}


def test_a_directory_below_a_file(tmp_path: Path, training: Any, read_steps: Any) -> None:
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
    assert read_steps(directory)["grad_norm/pre"] == [3]


@pytest.mark.parametrize("removed", ["directory", "file"])
def test_what_is_removed_while_training_is_made_again(
    tmp_path: Path, training: Any, read_steps: Any, removed: str
) -> None:
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
    assert read_steps(directory)["grad_norm/pre"] == [2, 3]


def test_a_directory_that_is_moved_takes_its_curves_along(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=tmp_path / "here") as clipper:
        run.take(1.0)
        clipper.flush()
        (tmp_path / "here").rename(tmp_path / "there")
        run.take(1.0)
    assert read_steps(tmp_path / "there")["grad_norm/pre"] == [0, 1]


def test_a_sink_of_the_user_that_raises_stops_neither_training_nor_the_others(
    tmp_path: Path, training: Any, read_steps: Any
) -> None:
    class Broken(Sink):
        def write(self, steps: Sequence[LoggedStep]) -> None:
            raise ZeroDivisionError("mine")

        def close(self) -> None:
            raise ZeroDivisionError("mine")

    run = training()
    clipper = GradientClipper(run.optimizer, 1.0, log=[Broken(), tmp_path])
    with pytest.warns(RuntimeWarning, match="Broken failed .*ZeroDivisionError: mine"):
        run.take(*[1.0] * 100)
    run.take(1.0)
    clipper.close()
    assert clipper.steps == 101
    assert read_steps(tmp_path)["grad_norm/pre"] == list(range(101))
