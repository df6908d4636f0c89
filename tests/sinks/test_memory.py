from __future__ import annotations

import sys

import pytest

from gradclip import ArgumentError, GradientClipper, LoggedStep, MemorySink

COLUMNS = [name for name in LoggedStep._fields[1:] if name != "parameter_norms"]


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
    assert list(table.columns) == COLUMNS
    assert table["norm"].tolist() == [4.0, 1.0]
    assert table.loc[1, "threshold"] == 2.0


def test_an_empty_table_has_all_columns():
    assert list(MemorySink().to_pandas().columns) == COLUMNS


def test_without_pandas_the_steps_are_there_all_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        MemorySink().to_pandas()


def test_the_picture_shows_the_steps_with_the_norms_of_parameters(training, tmp_path):
    run, sink = training(), MemorySink(per_parameter="all", per_parameter_every=2)
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(4.0, 1.0, 3.0)
    before = sorted(name for name in sys.modules if name == "matplotlib.pyplot")
    figure = sink.plot()
    norms, rates, _, parameters, *_ = figure.axes
    before_clipping = norms.get_lines()[0]
    assert before_clipping.get_xdata().tolist() == [0, 1, 2]
    assert before_clipping.get_ydata().tolist() == [4.0, 1.0, 3.0]
    assert norms.get_legend().get_title().get_text() == "3 steps in memory"
    assert rates.get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert parameters.collections[0].get_array().shape == (1, 2)
    assert sorted(name for name in sys.modules if name == "matplotlib.pyplot") == before
    # What a notebook asks for that has not loaded pyplot.
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [*tmp_path.iterdir()] == []
    figure.savefig(tmp_path / "by hand.pdf")
    sink.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_the_picture_takes_the_later_of_steps_that_come_again(training):
    run, sink = training(), MemorySink()
    for first in (0, 1):
        with GradientClipper(run.optimizer, None, log=sink) as clipper:
            clipper.steps = first
            run.take(1.0 + first, 5.0 + first)
    assert sink.plot().axes[0].get_lines()[0].get_ydata().tolist() == [1.0, 2.0, 6.0]


def test_a_picture_of_nothing_or_at_a_path_for_none_is_refused(training, tmp_path):
    with pytest.raises(ArgumentError, match="no steps to draw yet.*flush"):
        MemorySink().plot(tmp_path / "a.png")
    run, sink = training(), MemorySink()
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(4.0)
    with pytest.raises(ArgumentError, match="ends with .png or .svg"):
        sink.plot(tmp_path / "a.pdf")
    assert [*tmp_path.iterdir()] == []


def test_without_matplotlib_the_picture_names_the_extra(monkeypatch, training):
    run, sink = training(), MemorySink()
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(4.0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gradclip\[report\]"'):
        sink.plot()
