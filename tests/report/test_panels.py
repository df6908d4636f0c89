"""What is drawn of runs, of any length."""

from __future__ import annotations

import time

import numpy as np
import pytest
from matplotlib.text import Annotation

from gradclip.report.pictures import picture
from gradclip.report.pictures.distribution import percent
from gradclip.report.pictures.panels import COLUMNS, envelope, running_clip_rate, thinned, window_of
from gradclip.report.pictures.picture import draw, figure_of
from tests.report.pictured import (
    INF,
    NAN,
    STEPS,
    cramped,
    curve,
    exploding,
    legend_texts,
    noise,
    run_of,
    spiky,
)


def test_norms_are_drawn_with_the_threshold_and_what_clipping_left():
    run = run_of([1.0, 4.0, 8.0, 2.0, 3.0], threshold=3.0)
    norms, *_ = figure_of([run]).axes
    assert norms.get_yscale() == "log"
    before, after, threshold = (curve(norms, name) for name in ("before", "after", "threshold 3"))
    assert before.get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert before.get_ydata().tolist() == [1, 4, 8, 2, 3]
    assert np.array_equal(after.get_ydata(), [NAN, 3, 3, NAN, NAN], equal_nan=True)
    assert (threshold.get_linestyle(), threshold.get_ydata().tolist()) == ("--", [3] * 5)
    assert legend_texts(norms) == ["before clipping", "after clipping", "threshold 3"]
    low, high = norms.get_ylim()
    assert low < 1
    assert high > 8


def test_what_clipping_did_not_change_is_drawn_once():
    norms, *_ = figure_of([run_of([1.0, 4.0, 2.0])]).axes
    assert legend_texts(norms) == ["before clipping"]


def test_a_threshold_that_changes_is_a_curve_and_one_far_away_is_named():
    norms, *_ = figure_of([run_of([1.0, 2.0, 3.0], threshold=[1.5, NAN, 2.5])]).axes
    assert np.array_equal(curve(norms, "threshold").get_ydata(), [1.5, NAN, 2.5], equal_nan=True)
    norms, *_ = figure_of([run_of([1.0, 2.0], threshold=1e9)]).axes
    assert legend_texts(norms)[-1] == "threshold 1e+09 (above)"
    assert norms.get_ylim()[1] < 10
    norms, *_ = figure_of([run_of([1.0, 2.0], threshold=900.0)]).axes
    assert norms.get_ylim()[1] > 900


def test_steps_that_were_not_finite_skipped_or_without_gradient_are_marked_and_counted():
    norms, *_ = figure_of([run_of([1.0, NAN, INF, 0.0, 2.0], skipped=[2])]).axes
    steps = {
        name: curve(norms, name).get_xdata().tolist()
        for name in ("not finite (2)", "skipped (1)", "norm 0 (1)")
    }
    assert steps == {"not finite (2)": [1, 2], "skipped (1)": [2], "norm 0 (1)": [3]}
    assert len({curve(norms, name).get_marker() for name in steps}) == 3


def test_marks_are_where_no_curve_runs():
    figure = figure_of([exploding()])
    norms = figure.axes[0]
    top = norms.transData.transform((0, np.nanmax(curve(norms, "before").get_ydata())))[1]
    for name in ("not finite", "skipped"):
        mark = curve(norms, name)
        height = mark.get_transform().transform((0, mark.get_ydata()[0]))[1]
        assert height - mark.get_markersize() / 2 > top


def test_a_finite_step_between_others_is_a_point():
    norms, *_ = figure_of([run_of([NAN, 5.0, NAN, 1.0, 2.0, NAN])]).axes
    [points] = [line for line in norms.get_lines() if line.get_marker() == "."]
    assert (points.get_xdata().tolist(), points.get_ydata().tolist()) == ([1], [5])


def test_the_clip_rate_is_that_of_the_last_steps():
    run = run_of(np.where(np.arange(3000) % 10 < 3, 5.0, 1.0), threshold=2.0)
    run.norms[100:200] = NAN
    for window in (1, 7, 50, 3000):
        rates = running_clip_rate(run, window)
        for at in (0, 3, 6, 99, 130, 260, 2999):
            part = slice(max(at + 1 - window, 0), at + 1)
            finite = run.finite[part].sum()
            expected = run.clipped[part].sum() / finite if finite else NAN
            assert rates[at] == pytest.approx(expected, nan_ok=True)
    rates = figure_of([run]).axes[1]
    assert "clipped: share of the last 50 steps" in rates.get_xlabel()
    assert curve(rates, "clip rate").get_ydata()[-1] == pytest.approx(0.3)
    assert [label.get_text() for label in rates.get_yticklabels()] == ["0%", "50%", "100%"]


@pytest.mark.parametrize(
    ("steps", "window"), [(1, 1), (19, 19), (500, 20), (2001, 50), (10_000, 100), (10**6, 10_000)]
)
def test_the_window_of_the_clip_rate_is_a_round_number(steps, window):
    assert window_of(run_of(np.ones(steps))) == window


def test_the_distribution_counts_every_norm_that_has_a_logarithm():
    run = run_of([0.0, NAN, INF, *spiky()])
    distribution = figure_of([run]).axes[2]
    assert (distribution.get_xscale(), distribution.get_yscale()) == ("log", "log")
    [stairs] = distribution.patches
    counts, edges, _ = stairs.get_data()
    assert counts[counts >= 1].sum() == STEPS
    for norm in spiky()[[100, 101, 300]]:
        place = np.searchsorted(edges, norm) - 1
        assert counts[place] >= 1


def thresholds_of(axes):
    return [each for each in axes.texts if isinstance(each, Annotation) and "%" in each.get_text()]


def test_thresholds_have_their_lines_and_the_share_that_they_would_clip():
    norms = spiky()
    distribution = figure_of([run_of(norms)]).axes[2]
    labels = thresholds_of(distribution)
    lines = sorted(line.get_xdata()[0] for line in distribution.get_lines())
    assert len(labels) == len(lines) >= 6
    for label, limit in zip(labels, lines, strict=True):
        *advised, shown, share = label.get_text().split("\n")
        assert float(shown) == pytest.approx(limit, rel=0.01)
        assert share == percent((norms > limit).mean())
        assert label.xy[0] == limit
        assert advised in ([], ["advised"])
    [advised] = [label for label in labels if label.get_text().startswith("advised")]
    line = picture.advised(run_of(norms), picture.summarized(run_of(norms))).line
    assert line == f"GradientClipper(optimizer, {advised.xy[0]:g})"


def test_labels_of_thresholds_are_turned_where_there_is_no_room_side_by_side():
    wide, narrow = figure_of([run_of(spiky())]), figure_of([cramped(), cramped()])
    assert {label.get_rotation() for label in thresholds_of(wide.axes[2])} == {0}
    assert {label.get_rotation() for label in thresholds_of(narrow.axes[4])} == {90}


def test_without_a_norm_above_0_the_distribution_says_so():
    distribution = figure_of([run_of([NAN, 0.0])]).axes[2]
    assert [text.get_text() for text in distribution.texts] == ["no norm is finite and above 0"]


def test_several_runs_stand_side_by_side_on_the_same_scales():
    runs = [run_of(noise(), name="x/a"), run_of(spiky() * 100, name="x/b")]
    figure = figure_of(runs)
    assert len(figure.axes) == 6
    for row in range(3):
        left, right = figure.axes[2 * row : 2 * row + 2]
        assert left.get_ylim() == right.get_ylim()
        assert left.bbox.y0 == pytest.approx(right.bbox.y0)
        assert left.bbox.x1 < right.bbox.x0
    assert figure.axes[4].get_xlim() == figure.axes[5].get_xlim()
    titles = [axes.get_legend().get_title().get_text() for axes in figure.axes[:2]]
    assert titles == ["x/a", "x/b"]


# Long runs


@pytest.mark.parametrize("count", [2 * COLUMNS, 2 * COLUMNS + 1, 50_000])
def test_no_spike_and_no_gap_of_a_long_run_is_lost(count):
    values = noise(count)
    spikes, dips = [0, count // 3, count - 1], [5, count // 2]
    values[spikes], values[dips] = [1e3, 2e3, 3e3], [1e-3, 2e-3]
    values[count // 4 : count // 4 + 200] = NAN
    shown = envelope(np.arange(count) * 3 + 7, values)
    assert len(shown.steps) <= 2 * COLUMNS
    assert {1e3, 2e3, 3e3} <= {*shown.high}
    assert {1e-3, 2e-3} <= {*shown.low}
    assert np.isnan(shown.high).any()
    places = np.searchsorted(shown.steps, np.array(spikes) * 3 + 7)
    for place, height in zip(places, (1e3, 2e3, 3e3), strict=True):
        assert height in shown.high[max(place - 1, 0) : place + 2]
    steps, heights = shown.line
    assert len(steps) == len(heights) <= 2 * len(shown.steps)
    assert np.nanmax(heights) == 3e3
    assert np.nanmin(heights) == 1e-3


def test_marks_of_a_long_run_are_thinned_to_what_can_be_seen():
    steps = np.arange(10**6) + 5
    kept = thinned(steps)
    assert len(kept) <= COLUMNS + 1
    assert (kept[0], np.diff(kept).max()) == (5, 10**6 / COLUMNS)
    assert thinned(steps[:30]).tolist() == steps[:30].tolist()


def test_a_million_steps_are_drawn_in_seconds(tmp_path):
    norms = np.tile(noise(10_000), 100)
    norms[777_777] = 1e5
    run = run_of(norms, threshold=2.0)
    advice = [picture.advised(run, picture.summarized(run))]
    begun = time.perf_counter()
    figure = draw([run], tmp_path / "long.png", advice)
    assert time.perf_counter() - begun < 20  # 3 s, on a machine that does nothing else
    assert curve(figure.axes[0], "before").get_ydata().max() == 1e5
