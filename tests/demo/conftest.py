"""The demo as its users call it, and TensorBoard's own reader."""

from __future__ import annotations

import functools
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradclip.cli.demo.task import read_text
from gradclip.cli.main import main

text = functools.cache(read_text)
Points = dict[str, list[tuple[int, float]]]


def read_scalars(folder: str | os.PathLike[str]) -> Points:
    """Read every point of every scalar in a folder or file, as TensorBoard does."""
    reader = EventAccumulator(os.fspath(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(point.step, point.value) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }


def png_size(path: Path) -> tuple[int, int]:
    """Read width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:])
    return width, height


@pytest.fixture(name="read_scalars")
def read_scalars_fixture():
    return read_scalars


@pytest.fixture(name="png_size")
def png_size_fixture():
    return png_size


@pytest.fixture
def hide(monkeypatch):
    """Make a package look as if it were not installed."""

    def hidden(package: str) -> None:
        for name in [package, *sys.modules]:
            if name.split(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)

    return hidden


@dataclass
class Done:
    """What a call of the demo left behind."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def unclipped(self) -> Points:
        return read_scalars(self.folder / "unclipped")

    @property
    def clipped(self) -> Points:
        return read_scalars(self.folder / "clipped")


@pytest.fixture
def demo(tmp_path, capsys, monkeypatch):
    """Run the demo in this process, with a few steps, and without its picture to be quick."""

    def run(*arguments: str, steps: int = 3, folder: str = "out", picture: bool = False) -> Done:
        capsys.readouterr()
        path = tmp_path / folder
        monkeypatch.setattr("gradclip.cli.demo.run.read_text", text)
        if not picture:
            monkeypatch.setattr("gradclip.cli.demo.run.draw", lambda runs, options: None)
        code = main(["demo", "--steps", str(steps), "--out", str(path), *arguments])
        return Done(code, *capsys.readouterr(), path)

    return run
