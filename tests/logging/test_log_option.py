"""The ``log=`` option: what it takes, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    Sink,
    TensorBoardSink,
)
from tests.support.curves import Kept, indices_in, log_run, steps_in


@pytest.mark.parametrize("log", [None, []])
def test_nothing_to_log_to(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    assert log_run(log, 1.0).steps == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("kind", [str, Path])
def test_directory_is_made_when_it_is_written(tmp_path, training, kind):
    run = training()
    with GradientClipper(run.optimizer, 1.0, log=kind(tmp_path / "run")):
        run.take(*[1.0] * 99)
        assert not (tmp_path / "run").exists()
        run.take(1.0)
        assert (tmp_path / "run").exists()
    assert steps_in(tmp_path / "run")["grad_norm/pre"] == [*range(100)]


def test_lists_and_tuples_of_all_kinds(tmp_path):
    first, last = MemorySink(), MemorySink()
    with SummaryWriter(str(tmp_path / "b")) as writer:
        log_run((first, [str(tmp_path / "a"), writer], last), 1.0)
    assert indices_in(first) == indices_in(last) == [0]
    assert steps_in(tmp_path / "a").keys() == steps_in(tmp_path / "b").keys() != set()


def test_sinks_show_where_they_write(tmp_path):
    """One that cannot write is no sink."""
    with pytest.raises(TypeError, match="abstract"):
        Sink()
    sinks = TensorBoardSink(tmp_path / "run"), JsonlSink(tmp_path / "a"), MemorySink()
    names = [f"TensorBoardSink('{tmp_path}/run')", f"JsonlSink('{tmp_path}/a')"]
    assert [*map(repr, sinks)] == [*names, "MemorySink(0 steps)"]
    sinks[0].close()
    assert [*tmp_path.iterdir()] == [], "nothing was written"


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (True, "log is True"),
        (3, "log is 3"),
        (b"runs", "log is b'runs'"),
        ({"where": "runs"}, "log is {'where': 'runs'}"),
        (MemorySink, "log is the class MemorySink"),
        (print, "log is <built-in function print>"),
        (["runs", 3], "log is 3"),
        ("", "where is ''"),
        ("s3://bucket/runs", "where is 's3://bucket/runs'"),
        (["gs://bucket/runs"], "where is 'gs://bucket/runs'"),
        ("runs\0a", "where is 'runs\\x00a'"),
        (SimpleNamespace(add_scalar=print), "where is a types.SimpleNamespace"),
        (SummaryWriter, "where is a builtins.type"),
        *[
            (Kept(flush_every=count), f"Kept.flush_every is {count!r}")
            for count in (0, -1, 2.0, "10", None, True)
        ],
    ],
)
def test_invalid_logs_are_refused(training, log, found):
    with pytest.raises(ArgumentError) as caught:
        GradientClipper(training().optimizer, 1.0, log=log)
    assert str(caught.value).startswith(f"{found}: give ")


@pytest.mark.parametrize(
    ("kind", "argument", "needed"),
    [
        (TensorBoardSink, ["runs"], "where is a list"),
        *[(JsonlSink, path, "the path of a file") for path in (None, 3, "", b"run.jsonl", ".")],
        *[(CallableSink, log, "a function of a dict") for log in (None, 3, "wandb", dict)],
    ],
)
def test_invalid_destinations_are_refused(kind, argument, needed):
    with pytest.raises(ArgumentError, match=needed):
        kind(argument)
