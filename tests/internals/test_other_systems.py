"""Logs under the rules of Windows, simulated: no locks, and no open file is replaced."""

import builtins
import json
import os
import subprocess
import sys

import pytest
import torch

import gradclip
from gradclip.cli import main
from gradclip.records.sinks import jsonl

IMPORTING = """
import sys
sys.modules["fcntl"] = None  # as where there is none
import gradclip
from gradclip.records.sinks import jsonl
assert jsonl.fcntl is None
"""


@pytest.fixture
def rules_of_windows(monkeypatch):
    """Refuse what Windows refuses: locks of fcntl, and renaming or removing files that are open."""
    opened = []
    open_as_ever = builtins.open

    def tracked(path, *arguments, **options):
        file = open_as_ever(path, *arguments, **options)
        opened.append(
            (os.path.realpath(path) if isinstance(path, str | os.PathLike) else path, file)
        )
        return file

    def refusing(change):
        def changed(*paths, **options):
            for path, file in opened:
                if not file.closed and path in map(os.path.realpath, paths):
                    raise PermissionError(13, "The process cannot access the file", path)
            return change(*paths, **options)

        return changed

    monkeypatch.setattr(jsonl, "fcntl", None)
    monkeypatch.setattr(builtins, "open", tracked)
    for name in ("replace", "rename", "remove", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))


def test_the_simulation_refuses(rules_of_windows, tmp_path):
    with open(tmp_path / "a", "w"), pytest.raises(PermissionError):
        os.replace(tmp_path / "a", tmp_path / "b")
    os.replace(tmp_path / "a", tmp_path / "b")


def log_norms_of(log, norms) -> None:
    """Log steps with these norms."""
    weight = torch.nn.Parameter(torch.zeros(2))
    with gradclip.GradientClipper(torch.optim.SGD([weight]), None, log=log) as clipper:
        for norm in norms:
            weight.grad = torch.tensor([0.6, 0.8]) * norm
            clipper.step()


def test_without_locks_lines_are_appended_and_a_torn_one_is_ended(rules_of_windows, tmp_path):
    path = tmp_path / "run.jsonl"
    log_norms_of(gradclip.JsonlSink(path), [1.0, 2.0])
    path.write_bytes(path.read_bytes()[:-5])
    log_norms_of(gradclip.JsonlSink(path), [4.0])
    first, torn, last = path.read_text().splitlines()
    assert json.loads(first)["norm"] == pytest.approx(1.0)
    assert not torn.endswith("}")
    assert json.loads(last)["norm"] == pytest.approx(4.0)


@pytest.mark.parametrize("log", ["events", "run.jsonl"])
def test_reports_and_their_pictures_replace_older_ones(rules_of_windows, tmp_path, log):
    place = tmp_path / log
    log_norms_of(gradclip.JsonlSink(place) if log == "run.jsonl" else str(place), [1.0, 2.0, 4.0])
    picture = tmp_path / "plot.png"
    for _ in range(2):
        assert main(["report", str(place), "--plot", str(picture)]) == 0
    assert picture.stat().st_size


def test_a_system_without_fcntl_imports():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
