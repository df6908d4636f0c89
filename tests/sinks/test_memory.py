from __future__ import annotations

import sys

import pytest

from gradclip import GradientClipper, LoggedStep, MemorySink


def test_the_steps_are_kept_in_their_order(training):
    run, sink = training(), MemorySink()
    clipper = GradientClipper(run.optimizer, 2.0, log=sink)
    run.take(4.0, 1.0)
    clipper.flush()
    run.take(3.0)
    clipper.close()
    assert [step.norm for step in sink.steps] == [4.0, 1.0, 3.0]
    assert [step.clipped_norm for step in sink.steps] == [2.0, 1.0, 2.0]
    assert repr(sink) == "MemorySink(3 steps)"


def test_only_chosen_steps_are_kept(training):
    run, sink = training(), MemorySink(every=2, flush_every=1)
    with GradientClipper(run.optimizer, None, log=sink):
        run.take(1.0, 2.0, 3.0)
        assert [step.step for step in sink.steps] == [0, 2]


def test_a_table_has_a_row_for_each_step(training):
    run, sink = training(), MemorySink()
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(4.0, 1.0)
    table = sink.to_pandas()
    assert table.index.name == "step"
    assert list(table.columns) == list(LoggedStep._fields[1:])
    assert table["norm"].tolist() == [4.0, 1.0]
    assert table.loc[1, "threshold"] == 2.0


def test_an_empty_table_has_all_columns():
    assert list(MemorySink().to_pandas().columns) == list(LoggedStep._fields[1:])


def test_without_pandas_the_steps_are_there_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        MemorySink().to_pandas()
