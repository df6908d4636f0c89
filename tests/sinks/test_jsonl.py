from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from gradclip import ArgumentError, GradientClipper, JsonlSink, LoggedStep
from gradclip.records.sinks import jsonl


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def step(index: int, norm: float = 1.0) -> LoggedStep:
    return LoggedStep(index, 0.0, norm, norm, None, 1.0, False, False, 0.0, 0, 0)


def test_each_step_is_a_line_with_all_its_numbers(tmp_path, training):
    run, path = training(), tmp_path / "deep" / "run.jsonl"
    with GradientClipper(run.optimizer, 2.0, log=JsonlSink(path)) as clipper:
        run.take(4.0, 1.0)
        clipper.flush()
        first = lines(path)
    assert [set(line) for line in first] == [set(LoggedStep._fields[:-2])] * 2
    assert first[0] | {"wall_time": 0} == {
        **dict([*step(0, 4.0)._asdict().items()][:-2]),
        "clipped_norm": 2.0,
        "threshold": 2.0,
        "coefficient": 0.5,
        "clip_rate": 1.0,
    }
    assert first[1]["wall_time"] >= first[0]["wall_time"] > 1e9
    assert lines(path) == first


def test_numbers_that_are_not_finite_are_null_as_json_has_none(tmp_path, training):
    run, path = training(), tmp_path / "run.jsonl"
    with GradientClipper(run.optimizer, 2.0, nonfinite="propagate", log=JsonlSink(path)):
        run.take(math.nan, math.inf, 1.0)
    assert [line["norm"] for line in lines(path)] == [None, None, 1.0]
    assert [line["nonfinite"] for line in lines(path)] == [True, True, False]


def test_a_run_that_continues_appends(tmp_path):
    path = tmp_path / "run.jsonl"
    for begin in (0, 2):
        JsonlSink(path).write([step(begin), step(begin + 1)])
    assert [line["step"] for line in lines(path)] == [0, 1, 2, 3]


def test_half_a_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 0}\n{"ste')
    JsonlSink(path).write([step(7)])
    first, torn, last = path.read_text().splitlines()
    assert (first, torn, json.loads(last)["step"]) == ('{"step": 0}', '{"ste', 7)


def test_only_chosen_steps_are_written(tmp_path):
    path = tmp_path / "run.jsonl"
    JsonlSink(path, every=3).write([step(index) for index in range(8)])
    assert [line["step"] for line in lines(path)] == [0, 3, 6]


@pytest.mark.slow
def test_batches_of_several_processes_stay_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    code = """
import sys
from gradclip import JsonlSink, LoggedStep
sink = JsonlSink(sys.argv[1])
number = int(sys.argv[2])
for batch in range(50):
    sink.write([LoggedStep(number, 0.0, 1.0, 1.0, None, 1.0, False, False, 0.0, 0, 0)] * 20)
"""
    command = [sys.executable, "-c", code, str(path)]
    processes = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    found = [line["step"] for line in lines(path)]
    assert len(found) == 3000
    assert all(len(set(found[at : at + 20])) == 1 for at in range(0, 3000, 20))


def test_a_line_that_another_process_is_writing_is_waited_for(tmp_path):
    path = tmp_path / "run.jsonl"
    with (
        open(path, "a", encoding="utf-8") as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        fcntl.flock(other, fcntl.LOCK_EX)
        print('{"step":', end="", file=other, flush=True)
        written = pool.submit(JsonlSink(path).write, [step(7)])
        with pytest.raises(concurrent.futures.TimeoutError):
            written.result(timeout=0.2)
        print(" 0}", file=other, flush=True)
        fcntl.flock(other, fcntl.LOCK_UN)
        written.result(timeout=60)
    assert [line["step"] for line in lines(path)] == [0, 7]


@pytest.mark.parametrize("locks", [None, Mock(flock=Mock(side_effect=OSError(errno.ENOLCK, "")))])
def test_lines_are_written_where_there_are_no_locks(locks, monkeypatch, tmp_path):
    monkeypatch.setattr(jsonl, "fcntl", locks)
    JsonlSink(tmp_path / "run.jsonl").write([step(7)])
    assert [line["step"] for line in lines(tmp_path / "run.jsonl")] == [7]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_reported_and_training_goes_on(training, monkeypatch, tmp_path):
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    run = training()
    clipper = GradientClipper(run.optimizer, 2.0, log=JsonlSink(tmp_path / "run.jsonl"))
    run.take(1.0)
    with pytest.warns(RuntimeWarning, match="JsonlSink failed and may miss steps: OSError"):
        clipper.flush()
    run.take(1.0)
    assert clipper.steps == 2
    clipper.close()


@pytest.mark.parametrize("path", [None, 3, "", b"run.jsonl", "."])
def test_what_is_no_path_of_a_file_is_refused(path):
    with pytest.raises(ArgumentError, match="give the path of a file"):
        JsonlSink(path)


def test_it_shows_where_it_writes(tmp_path):
    assert repr(JsonlSink(tmp_path / "a")) == f"JsonlSink('{tmp_path}/a')"
