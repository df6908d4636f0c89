"""What a user may give as log=."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import ArgumentError, LoggedStep, Sink, TensorBoardSink
from gradclip.records.sinks.log_option import sinks_from


class Nothing(Sink):
    def write(self, steps: Sequence[LoggedStep]) -> None: ...


def test_none_and_an_empty_list_log_nothing() -> None:
    assert sinks_from(None) == []
    assert sinks_from([]) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_a_directory_goes_to_tensorboard_and_is_made_when_it_is_written(
    tmp_path: Path, kind: type
) -> None:
    (sink,) = sinks_from(kind(tmp_path / "run"))
    assert isinstance(sink, TensorBoardSink)
    assert repr(sink) == f"TensorBoardSink('{tmp_path}/run')"
    assert (sink.every, sink.flush_every) == (1, 100)
    assert not (tmp_path / "run").exists()


def test_a_writer_goes_to_tensorboard(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        (sink,) = sinks_from(writer)
    assert isinstance(sink, TensorBoardSink)


def test_sinks_are_taken_as_they_are_and_lists_in_their_order(tmp_path: Path) -> None:
    nothing = Nothing()
    first, second, third = sinks_from([nothing, str(tmp_path), (other := Nothing())])
    assert (first, third) == (nothing, other)
    assert isinstance(second, TensorBoardSink)
    assert sinks_from((nothing,)) == [nothing]


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (True, "log is True"),
        (3, "log is 3"),
        (b"runs", "log is b'runs'"),
        ({"where": "runs"}, "log is {'where': 'runs'}"),
        (Nothing, "log is the class Nothing"),
        (print, "log is <built-in function print>"),
        (["runs", 3], "log is 3"),
        ("", "where is ''"),
        ("s3://bucket/runs", "where is 's3://bucket/runs'"),
        (["gs://bucket/runs"], "where is 'gs://bucket/runs'"),
        ("runs\0a", "where is 'runs\\x00a'"),
        (SimpleNamespace(add_scalar=print), "where is a types.SimpleNamespace"),
        (SummaryWriter, "where is a builtins.type"),
    ],
)
def test_what_cannot_be_meant_is_refused(log: object, found: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        sinks_from(log)
    assert str(caught.value).startswith(f"{found}: give ")


def test_a_sink_of_tensorboard_takes_no_list() -> None:
    with pytest.raises(ArgumentError, match="where is a list"):
        TensorBoardSink(["runs"])  # type: ignore[arg-type]
