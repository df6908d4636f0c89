"""Lines of JSON in a file that several processes and several runs may write to."""

import concurrent.futures
import errno
import fcntl
import json
from unittest.mock import Mock

import pytest

from gradclip import JsonlSink, LoggedStep
from tests.support.curves import lines_in, log_run
from tests.support.reference import bits_in

STEP = LoggedStep(7, 0.0, 4.0, 2.0, 2.0, 0.5, False, False, 1.0, 0, 0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


def test_line_has_all_numbers_of_a_step(tmp_path):
    """Each is a number of Python, of its type."""
    path = tmp_path / "deep" / "run.jsonl"
    log_run(JsonlSink(path), 4.0, 1.0)
    first, second = lines_in(path)
    fields = STEP._asdict()
    fields = {name: value for name, value in fields.items() if value is not None}
    assert bits_in(first | {"wall_time": 0.0, "step": 7}) == bits_in(fields)
    assert set(second) == set(fields)
    assert second["wall_time"] >= first["wall_time"] > 1e9


def test_run_that_continues_ends_a_line_that_was_cut_off(path):
    path.write_text('{"step": 0}\n{"ste')
    for index in (7, 8):
        JsonlSink(path).write([STEP._replace(step=index)])
    first, torn, *others = path.read_text().splitlines()
    assert (first, torn) == ('{"step": 0}', '{"ste')
    assert [json.loads(line)["step"] for line in others] == [7, 8]


def test_sink_waits_for_a_line_of_another_process(path):
    with (
        open(path, "a", encoding="utf-8") as other,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        fcntl.flock(other, fcntl.LOCK_EX)
        print('{"step":', end="", file=other, flush=True)
        written = pool.submit(JsonlSink(path).write, [STEP])
        with pytest.raises(concurrent.futures.TimeoutError):
            written.result(timeout=0.1)
        print(" 0}", file=other, flush=True)
        fcntl.flock(other, fcntl.LOCK_UN)
        written.result(timeout=60)
    assert [line["step"] for line in lines_in(path)] == [0, 7]


def write_batches(path, number):
    sink = JsonlSink(path)
    for _ in range(50):
        sink.write([STEP._replace(step=number)] * 20)


def test_batches_of_several_processes_stay_whole(path, children):
    processes = [children.begin(write_batches, path, number) for number in range(3)]
    for process in processes:
        process.join(60)
    found = [line["step"] for line in lines_in(path)]
    assert len(found) == 3000
    assert all(len(set(found[at : at + 20])) == 1 for at in range(0, 3000, 20))


@pytest.mark.parametrize("locks", [None, Mock(flock=Mock(side_effect=OSError(errno.ENOLCK, "")))])
def test_file_systems_without_locks(locks, monkeypatch, path):
    monkeypatch.setattr("gradclip.records.sinks.jsonl.fcntl", locks)
    JsonlSink(path).write([STEP])
    assert [line["step"] for line in lines_in(path)] == [7]
