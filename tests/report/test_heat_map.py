"""The map of parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from gradclip.report.pictures import heat_map
from gradclip.report.pictures.heat_map import color_range, heat_map_of
from gradclip.report.pictures.picture import figure_of
from gradclip.report.run import LoggedParameterNorms
from tests.report.pictured import (
    NAN,
    legend_texts,
    names_of,
    noise,
    parameters_of,
    run_of,
)


def test_the_map_shows_the_largest_norm_in_each_part(monkeypatch):
    monkeypatch.setattr(heat_map, "MOST_COLUMNS", 10)
    norms = np.ones(100)
    norms[57] = 1000.0
    shown = heat_map_of(run_of(norms), parameters_of(norms, ["a", "b"]))
    assert shown.norms.shape == (2, 10)
    assert shown.norms[:, 5].tolist() == pytest.approx([1000 * math.sqrt(2 / 3), 1000 * 3**-0.5])
    assert (np.delete(shown.norms, 5, axis=1) < 1).all()
    assert shown.edges.tolist() == [each * 10 - 0.5 for each in range(11)]


def test_the_map_shows_those_with_the_largest_share_in_the_order_of_the_log():
    names = names_of(161)
    parameters = parameters_of(noise(), names)
    order = np.random.default_rng(0).permutation(161).astype(np.int32)
    mixed = LoggedParameterNorms(
        tuple(np.array(names)[order]),
        parameters.steps,
        np.argsort(order)[parameters.name_indices],
        parameters.norms,
    )
    shown = heat_map_of(run_of(noise()), mixed)
    assert (len(shown.names), shown.logged) == (24, 161)
    assert {*shown.names} == {*names[:24]}
    assert [*shown.names] == [name for name in mixed.names if name in names[:24]]
    axes = figure_of([run_of(noise(), parameters=mixed)]).axes[3]
    assert "24 of 161 logged parameters" in axes.get_legend().get_title().get_text()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.rpartition(".h.")[2] for label in labels] == labels
    assert all(
        name.endswith(label.lstrip("…")) for name, label in zip(shown.names, labels, strict=True)
    )


def test_a_parameter_that_is_to_blame_is_shown_however_small_it_is():
    parameters = parameters_of(noise(), names_of(60))
    parameters.norms[(parameters.steps == 200) & (parameters.name_indices == 59)] = NAN
    norms = noise()
    norms[200] = NAN
    shown = heat_map_of(run_of(norms), parameters)
    assert shown.names[-1] == names_of(60)[59]
    assert np.argwhere(shown.nonfinite).tolist() == [[23, 200]]


def test_cells_that_are_not_finite_or_not_logged_have_colours_of_their_own():
    parameters = LoggedParameterNorms(
        ("a", "b"),
        np.array([0, 0, 4, 8]),
        np.array([0, 1, 0, 1], np.int32),
        np.array([1.0, 0.0, NAN, 2.0]),
    )
    run = run_of(np.ones(9), parameters=parameters)
    shown = heat_map_of(run, parameters)
    assert np.array_equal(shown.norms, [[1, NAN, NAN], [0, NAN, 2]], equal_nan=True)
    assert shown.nonfinite.tolist() == [[False, True, False], [False, False, False]]
    assert shown.edges.tolist() == [-0.5, 3.5, 7.5, 11.5]
    axes = figure_of([run]).axes[3]
    assert legend_texts(axes) == ["not finite", "not logged"]
    cells, faults = axes.collections
    colors = [to_hex(color) for color in cells.to_rgba(cells.get_array()).reshape(-1, 4)]
    assert colors[1] == colors[2] == colors[4] == "#d9d9d9"
    assert colors[3] == colors[0]  # of 0: the lowest colour
    assert len({colors[0], colors[5], "#d9d9d9"}) == 3
    assert faults.get_array().mask.ravel().tolist() == [True, False, True, True, True, True]


def test_colours_end_at_the_largest_norm_of_all_runs_and_leave_out_few():
    norms = noise(1000)
    norms[:5] = 1e-200
    norms[500] = 1e6
    maps = [
        heat_map_of(run_of(each), parameters_of(each, ["a"])) for each in (norms, noise(1000, 1))
    ]
    low, high = color_range(maps)
    assert high == pytest.approx(6)
    assert -1 < low < 0


def test_runs_without_parameters_leave_their_place_empty():
    with_parameters = run_of(noise(), parameters=parameters_of(noise(), ["a"]))
    figure = figure_of([run_of(noise()), with_parameters])
    assert [axes.get_visible() for axes in figure.axes[6:8]] == [False, True]
    assert len(figure.axes) == 9  # with the scale of colours
    assert len(figure_of([run_of(noise())]).axes) == 3
