"""Steps in memory, and the table and the picture of them."""

import sys

import pytest
import torch

from gradclip import ArgumentError, GradientClipper, LoggedStep, MemorySink
from tests.support.clippers import weights_of
from tests.support.curves import log_run

BY_PARAMETER = ("parameter_norms", "weight_norms", "update_ratios")
COLUMNS = [name for name in LoggedStep._fields[1:] if name not in BY_PARAMETER]


def kept_steps(*norms, **options):
    """Return a sink that keeps steps with these norms."""
    log_run(sink := MemorySink(**options), *norms)
    return sink


def test_table_has_a_row_for_each_step_and_a_column_for_each_parameter():
    table = kept_steps(4.0, 1.0).to_pandas()
    assert table.index.name == "step"
    assert list(table.columns) == COLUMNS == list(MemorySink().to_pandas().columns)
    assert table["norm"].tolist() == [4.0, 1.0]
    assert table.loc[1, "threshold"] == 2.0
    table = kept_steps(5.0, 3.0, 4.0, per_parameter=1, per_parameter_every=2).to_pandas()
    assert list(table.columns) == [*COLUMNS, "parameter_norm/group 0, parameter 0"]
    assert table.iloc[:, -1].fillna(-1).tolist() == [5.0, -1, 4.0]


def test_table_has_columns_for_weights(training):
    run, sink = training(), MemorySink(weights_every=2)
    weight = weights_of(run.optimizer)[0]
    torch.nn.init.constant_(weight, 3.0)
    with GradientClipper(run.optimizer, 2.0, log=sink):
        run.take(1.0, 1.0, 1.0)
    table = sink.to_pandas().iloc[:, -2:]
    name = "group 0, parameter 0"
    assert list(table.columns) == [f"weight_norm/{name}", f"update_ratio/{name}"]
    assert table.fillna(-1).to_numpy().tolist() == [[18**0.5, 0.0], [-1, -1], [18**0.5, 0.0]]


def test_picture_shows_the_steps_with_parameter_norms(tmp_path):
    sink = kept_steps(4.0, 1.0, 3.0, per_parameter="all", per_parameter_every=2)
    before = "matplotlib.pyplot" in sys.modules
    figure = sink.plot()
    norms, rates, _, parameters, *_ = figure.axes
    before_clipping = norms.get_lines()[0]
    assert before_clipping.get_xdata().tolist() == [0, 1, 2]
    assert before_clipping.get_ydata().tolist() == [4.0, 1.0, 3.0]
    assert norms.get_legend().get_title().get_text() == "3 steps in memory"
    assert rates.get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 2 / 3])
    assert parameters.collections[0].get_array().shape == (1, 2)
    assert ("matplotlib.pyplot" in sys.modules) == before
    # What a notebook asks for that has not loaded pyplot.
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [*tmp_path.iterdir()] == []
    figure.savefig(tmp_path / "by hand.pdf")
    sink.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_picture_takes_the_later_of_steps_that_come_again():
    sink = kept_steps(1.0, 5.0)
    log_run(sink, 2.0, 6.0, first=1)
    assert sink.plot().axes[0].get_lines()[0].get_ydata().tolist() == [1.0, 2.0, 6.0]


def test_picture_of_nothing_or_at_another_path(tmp_path):
    for norms, name, needed in (
        ((), "a.png", "no steps to draw yet.*flush"),
        ((4.0,), "a.pdf", "ends with .png or .svg"),
    ):
        with pytest.raises(ArgumentError, match=needed):
            kept_steps(*norms).plot(tmp_path / name)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("module", "method", "needed"),
    [
        ("pandas", MemorySink.to_pandas, "pandas"),
        ("matplotlib.figure", MemorySink.plot, r'pip install "gradclip\[report\]"'),
    ],
)
def test_library_that_is_missing(monkeypatch, module, method, needed):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=needed):
        method(kept_steps(4.0))
