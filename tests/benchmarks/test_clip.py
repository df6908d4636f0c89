from __future__ import annotations

import json
import math
import shutil

import pytest

from benchmarks.common.shapes import SETS
from benchmarks.common.timing import interleaved_medians
from benchmarks.cost import bandwidth, clip, instructions


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("small", 6, 3610),
        ("lstm", 11, 1_306_600),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
    ],
)
def test_the_sets_have_the_sizes_of_their_models(name, tensors, elements):
    shapes = SETS[name]()
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes)) == elements


def test_the_benchmark_runs_and_prints_ratios(capsys):
    clip.main(["--sets", "small", "--seconds", "0.1"])
    printed = capsys.readouterr().out
    assert "| small | bfloat16 | clipping |" in printed
    assert "clipping small by its inf-norm takes" in printed
    assert "| gradclip, torch operators |" in printed
    assert "logging adds" in printed


@pytest.mark.slow
def test_the_benchmark_speaks_json(capsys):
    clip.main(["--sets", "small", "--dtypes", "float32", "--seconds", "0.1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [row["regime"] for row in result["rows"]] == ["under", "clipping"]
    assert all(row["error"] < 1e-6 for row in result["rows"])


def test_memory_is_read_by_a_loop_in_c(monkeypatch):
    monkeypatch.setattr(bandwidth, "BYTES", 1 << 20)
    readers = bandwidth.readers()
    if shutil.which("gcc"):
        assert "a loop in C" in readers
    for reader in readers.values():
        reader()
    speed, name = bandwidth.read_bandwidth(0.01)
    assert speed > 0
    assert name in readers
    monkeypatch.setenv("CC", "no-such-compiler")
    assert list(bandwidth.readers()) == ["torch.dot"]


@pytest.mark.slow
@pytest.mark.skipif(not instructions.available(), reason="there is no valgrind")
def test_instructions_repeat_exactly_and_are_fewer_than_torchs():
    counted = instructions.count(calls=32)
    assert counted["function"] < counted["function, torch operators"] < counted["torch"]
    assert instructions.count(calls=32)["function"] == counted["function"]


@pytest.mark.slow
def test_without_valgrind_the_rest_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(instructions, "available", lambda: False)
    clip.main(["--sets", "small", "--dtypes", "float32", "--seconds", "0.1", "--instructions"])
    assert "instructions were not counted: valgrind is not there" in capsys.readouterr().out


def test_every_timed_call_is_prepared_for():
    calls = []
    rivals = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    interleaved_medians(rivals, lambda: calls.append("prepare"), 0.0)
    assert calls[:8] == ["prepare", "a", "prepare", "b", "prepare", "b", "prepare", "a"]
