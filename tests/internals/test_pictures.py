"""Pictures of runs: they show every step that matters, and everything in them can be read."""

import math
import sys
import time
from unittest.mock import Mock
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Annotation, Text

from gradclip import ArgumentError
from gradclip.report import Run
from gradclip.report.advice import advised
from gradclip.report.clip_rate import running_clip_rate, window_of
from gradclip.report.pictures import heat_map
from gradclip.report.pictures.distribution import percent, separated
from gradclip.report.pictures.heat_map import color_range, heat_map_of
from gradclip.report.pictures.panels import COLUMNS, envelope, thinned
from gradclip.report.pictures.picture import draw, figure_of
from gradclip.report.pictures.style import drawable, log_limits, log_tick_label, log_ticks
from gradclip.report.pictures.style import short_names as shortened
from gradclip.report.run import LoggedParameterNorms
from gradclip.report.summary import summarized

NAN, INF = math.nan, math.inf
OKABE_ITO = {"#0072b2", "#e69f00", "#d55e00", "#cc79a7"}
STEPS = 400


def run_of(
    norms, *, name="runs/a", threshold=NAN, skipped=(), first=0, parameters=None, losses=None
):
    norms, steps = np.asarray(norms, dtype=np.float64), np.arange(len(norms))
    thresholds = np.full(len(norms), threshold, dtype=np.float64)
    clipped = np.where(np.isfinite(norms), np.fmin(norms, thresholds), 0.0)
    is_skipped = np.isin(steps, skipped)
    losses = None if losses is None else np.asarray(losses, dtype=np.float64)
    return Run(name, steps + first, norms, clipped, thresholds, is_skipped, parameters, losses)


def noisy_norms(count=STEPS, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))


def spiky_norms():
    norms = noisy_norms()
    norms[[100, 101, 300]] *= [30, 100, 50]
    return norms


def norms_of_parameters(norms, names, *, every=1):
    """Norms of parameters, each with a smaller share than the one before."""
    shares = np.sqrt(np.arange(len(names), 0, -1) / sum(range(len(names) + 1)))
    steps, indices = np.arange(0, len(norms), every), np.arange(len(names), dtype=np.int32)
    parts = np.outer(np.asarray(norms, dtype=np.float64)[steps], shares).ravel()
    return LoggedParameterNorms(
        tuple(names), np.repeat(steps, len(names)), np.tile(indices, len(steps)), parts
    )


def names_of(count):
    return [f"transformer.h.{n // 4}.attn.c_proj_{n % 4}.weight" for n in range(count)]


def of_parameters(norms, names=("a", "b"), **options):
    return run_of(norms, parameters=norms_of_parameters(norms, names), **options)


def exploding_run():
    norms = noisy_norms() * np.r_[np.ones(300), np.geomspace(1, 1e9, 100)]
    norms[380:] = NAN
    norms[20] = INF
    parameters = norms_of_parameters(norms, ["embed.weight", "rnn.weight", "head.weight"], every=5)
    return run_of(norms, threshold=1.5, skipped=[20, 380, 381], parameters=parameters)


def with_losses():
    """A run whose losses fall, with two spikes, two that are not finite, and some steps without."""
    losses = np.exp(0.05 * np.random.default_rng(1).standard_normal(STEPS)) * np.linspace(
        4, 2, STEPS
    )
    losses[[150, 320]] *= 3
    losses[[200, 201]] = INF
    losses[250:260] = NAN
    return run_of(spiky_norms(), threshold=1.0, losses=losses)


def cramped():
    names = [f"encoder.layers.{n}.self_attention.projection.weight" for n in range(3)]
    return of_parameters(spiky_norms() * 1e13, names, threshold=1e13)


ENDS = [1e-300, 5e-324, 1e300, 1.7e308, 1.0]
LONG = [f"experiments/lr0.001_batch512_clip1.0_{'x' * 60}_{n}/logs/v0" for n in range(3)]
ODD = ["$_$", "a\nb", "\x00<&>", "$"]
PICTURES = {
    "quiet": lambda: [run_of(noisy_norms(), threshold=5.0)],
    "spiky": lambda: [run_of(spiky_norms(), threshold=1.0)],
    "many parameters": lambda: [of_parameters(spiky_norms(), names_of(161))],
    "exploding": lambda: [exploding_run()],
    "exploding beside quiet": lambda: [run_of(noisy_norms(), threshold=1.0), exploding_run()],
    "long names": lambda: [run_of(noisy_norms(), name=name) for name in LONG],
    "one step": lambda: [of_parameters([3.0], threshold=2.0)],
    "NaN only": lambda: [of_parameters([NAN] * 9)],
    "zeros": lambda: [of_parameters([0.0] * 9)],
    "zeros among others": lambda: [run_of([0.0] * 9 + [1.0] + [0.0] * 9, threshold=0.0)],
    "every other one": lambda: [run_of(np.where(np.arange(60) % 2, NAN, 1.0), threshold=2.0)],
    "the ends of the range": lambda: [of_parameters(ENDS, threshold=1e305)],
    "an infinite threshold": lambda: [run_of(noisy_norms(), threshold=INF)],
    "odd names": lambda: [
        of_parameters(noisy_norms(), ODD, name="$_^$\n\x1b[31m\udc80 中文 $\\frac{-->")
    ],
    "little room": lambda: [cramped(), cramped()],
    "late steps": lambda: [run_of(noisy_norms(), first=10**15)],
    "losses beside none": lambda: [with_losses(), of_parameters(noisy_norms())],
    "losses below 0": lambda: [run_of(noisy_norms(), losses=noisy_norms(seed=1) - 1)],
    "losses at the ends": lambda: [run_of([1.0] * 4, losses=[-1.7e308, 1.7e308, INF, 0.0])],
    "a loss that is not finite": lambda: [run_of([1.0] * 3, losses=[INF, NAN, INF])],
}
QUICK = ("exploding beside quiet", "odd names")


def curve(axes, label):
    """Return the curve whose label begins so."""
    [line] = [line for line in axes.get_lines() if str(line.get_label()).startswith(label)]
    return line


def first_panel(norms, **options):
    return figure_of([run_of(norms, **options)]).axes[0]


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def legend_title(axes):
    return axes.get_legend().get_title().get_text()


def shown(texts):
    return [text for text in texts if text.get_visible() and text.get_text()]


def visible_labels(axis):
    low, high = sorted(axis.get_view_interval())
    return shown(tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)


def overlap(texts):
    boxes = [Text.get_window_extent(text).padded(-0.5) for text in texts]
    return any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PICTURES]
)
def test_every_text_can_be_read_and_every_file_opened(tmp_path, name):
    """No two texts overlap, none is small or cut off, and no legend covers a panel."""
    runs, png, svg = PICTURES[name](), tmp_path / "a.PNG", tmp_path / "a.svg"
    figure = draw(runs, png)
    draw(runs, svg)
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.fromstring(svg.read_bytes()).tag == "{http://www.w3.org/2000/svg}svg"
    assert {*tmp_path.iterdir()} == {png, svg}
    whole, around_panels = figure.bbox.padded(1), []
    for axes in (axes for axes in figure.axes if axes.get_visible()):
        on_x, on_y = map(visible_labels, (axes.xaxis, axes.yaxis))
        texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        if legend := axes.get_legend():
            assert legend.get_window_extent().y0 >= axes.bbox.y1 - 1
            texts += [*legend.get_texts(), legend.get_title()]
        around_panels += shown([*texts, *on_x])
        assert not overlap(on_y)
        for text in shown([*texts, *on_x, *on_y]):
            assert text.get_fontsize() >= 9
            box = Text.get_window_extent(text)
            assert whole.contains(box.x0, box.y0), text
            assert whole.contains(box.x1, box.y1), text
    assert not overlap(around_panels)
    for norms in figure.axes[: len(runs)]:
        labels = [label.get_text() for label in visible_labels(norms.yaxis)]
        assert 2 <= len({*labels}) == len(labels) <= 12


@pytest.mark.parametrize(
    "ends",
    [(0.9, 1.1), (0.5, 3), (1, 9), (1e-3, 1e5), (1e-300, 1e300), (3e7, 4e8), (1e-307, 1e-305)],
)
def test_ticks_are_round_numbers_within_the_limits(ends):
    low, high = log_limits(np.array([*ends, NAN]))
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(tick for tick in ticks if low <= tick <= high)
    assert all(tick == float(f"{tick:.1e}") for tick in ticks)


def test_texts_of_numbers_and_names():
    assert [log_tick_label(value, plain=True) for value in (1000.0, 0.25)] == ["1000", "0.25"]
    assert log_tick_label(1e-12, plain=False) == "$10^{-12}$"
    shares = (0, 0.00012, 0.0123, 0.456, 0.994, 0.9999, 1)
    assert [*map(percent, shares)] == ["0%", "0.012%", "1.2%", "46%", "99.4%", "100%", "100%"]
    assert drawable("a/b.weight äé…") == "a/b.weight äé…"
    assert drawable("a\nb\x00\udc80中") == "a\\nb\\x00\\udc80\\u4e2d"


def test_names_are_shortened_where_they_do_not_differ():
    assert shortened(["a", "b"], 10, "/") == ["a", "b"]
    long = [f"experiments/of/today/learning_rate_{n}/logs" for n in range(2)]
    assert shortened(long, 24, "/") == ["…learning_rate_0/logs", "…learning_rate_1/logs"]
    many, other = "x" * 50, "y" * 50
    several = [(f"{many}{n}", f"{n}{many}", f"{many}{n}{other}") for n in range(3)]
    for names in (*zip(*several, strict=True), [many, many, other]):
        short = shortened(names, 12, "/")
        assert max(map(len, short)) <= 12
        assert len({*short}) == len({*names})
    assert shortened(["a/" * 20 + "end"], 12, "/")[0].endswith("end")


def test_colours_differ_for_the_colour_blind_too():
    figure = figure_of([exploding_run()])
    colours = {to_hex(line.get_color()) for axes in figure.axes[:3] for line in axes.get_lines()}
    grey = {colour for colour in colours if colour[1:3] == colour[3:5] == colour[5:7]}
    assert colours - grey == OKABE_ITO
    assert figure.axes[3].collections[0].get_cmap().name == "viridis"


def test_labels_move_apart_and_no_further():
    for centers, moved in ([100.0, 300.0, 500.0], [100, 300, 500]), ([300.0] * 2, [275, 325]):
        assert separated(np.array(centers), np.full(len(moved), 50.0), 600).tolist() == moved
    random = np.random.default_rng(0)
    widths = random.uniform(5, 12, 40)
    centers = separated(np.sort(random.uniform(0, 600, 40)), widths, 600)
    left, right = centers - widths / 2, centers + widths / 2
    assert (left[1:] >= right[:-1] - 1e-9).all()
    assert -1e-9 <= left[0] < right[-1] <= 600 + 1e-9


def test_norms_before_and_after_clipping_and_the_threshold():
    norms = first_panel([1.0, 4.0, 8.0, 2.0, 3.0], threshold=3.0)
    before, after, threshold = (curve(norms, name) for name in ("before", "after", "threshold 3"))
    assert before.get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert before.get_ydata().tolist() == [1, 4, 8, 2, 3]
    assert np.array_equal(after.get_ydata(), [NAN, 3, 3, NAN, NAN], equal_nan=True)
    assert (threshold.get_linestyle(), threshold.get_ydata().tolist()) == ("--", [3] * 5)
    assert legend_texts(norms) == ["before clipping", "after clipping", "threshold 3"]
    low, high = norms.get_ylim()
    assert low < 1 < 8 < high
    assert legend_texts(first_panel([1.0, 4.0, 2.0])) == ["before clipping"]


@pytest.mark.parametrize(
    ("threshold", "label", "top"),
    [(1e9, "threshold 1e+09 (above)", 1), (900.0, "threshold 900", 900), (1.5, "threshold 1.5", 1)],
)
def test_a_threshold_far_away_is_named_and_not_shown(threshold, label, top):
    norms = first_panel([1.0, 2.0], threshold=threshold)
    assert legend_texts(norms)[-1] == label
    assert top < norms.get_ylim()[1] < 10 * top


def test_a_threshold_that_changes_is_a_curve_and_a_norm_between_others_a_point():
    norms = first_panel([NAN, 5.0, NAN, 2.0], threshold=(limits := [1.5, NAN, 2.5, 2.0]))
    assert np.array_equal(curve(norms, "threshold").get_ydata(), limits, equal_nan=True)
    points = [line for line in norms.get_lines() if line.get_marker() == "."]
    assert points[0].get_xdata().tolist() == [1, 3]


def test_exceptional_steps_are_marked_and_counted_above_all_curves():
    norms = first_panel([1.0, NAN, INF, 0.0, 2.0], skipped=[2])
    marks = [curve(norms, name) for name in ("not finite (2)", "skipped (1)", "norm 0 (1)")]
    assert [mark.get_xdata().tolist() for mark in marks] == [[1, 2], [2], [3]]
    assert len({mark.get_marker() for mark in marks}) == 3
    norms = figure_of([exploding_run()]).axes[0]
    top = norms.transData.transform((0, np.nanmax(curve(norms, "before").get_ydata())))[1]
    for mark in (curve(norms, "not finite"), curve(norms, "skipped")):
        height = mark.get_transform().transform((0, mark.get_ydata()[0]))[1]
        assert height - mark.get_markersize() / 2 > top


def test_the_clip_rate_is_that_of_the_last_steps():
    run = run_of(np.where(np.arange(3000) % 10 < 3, 5.0, 1.0), threshold=2.0)
    run.norms[100:200] = NAN
    for window in (1, 7, 50, 3000):
        rates = running_clip_rate(run, window)
        for step in (0, 3, 6, 99, 130, 260, 2999):
            last = slice(max(step + 1 - window, 0), step + 1)
            clipped = run.clipped[last][run.finite[last]]
            share = clipped.mean() if len(clipped) else NAN
            assert rates[step] == pytest.approx(share, nan_ok=True)
    rates = figure_of([run]).axes[1]
    assert "clipped: share of the last 50 steps" in rates.get_xlabel()
    assert curve(rates, "clip rate").get_ydata()[-1] == pytest.approx(0.3)
    for steps, window in ((1, 1), (19, 19), (500, 20), (2001, 50), (10_000, 100), (10**6, 10_000)):
        assert window_of(run_of(np.ones(steps))) == window


def test_losses_have_a_panel_where_there_are_any():
    """With the number of spikes and of losses that are not finite, and gaps where there is none."""
    figure = figure_of([with_losses(), run_of(noisy_norms())])
    losses, none = figure.axes[2:4]
    assert (losses.get_ylabel(), none.get_visible()) == ("loss", False)
    heights = curve(losses, "loss").get_ydata()
    assert np.isnan(heights).sum() == 12
    assert heights[150] > 2 * heights[149]
    assert legend_texts(losses)[1:] == ["not finite (2)", "spike (2)"]
    assert curve(losses, "spike").get_xdata().tolist() == [150, 320]
    assert losses.get_yscale() == "log"
    assert figure_of([run_of([1.0, 2.0], losses=[-1.0, 2.0])]).axes[1].get_yscale() == "linear"


def test_runs_beside_each_other_have_the_same_scales_and_their_names():
    runs = [run_of(noisy_norms(), name="runs/quiet"), run_of(spiky_norms() * 10, name="runs/spiky")]
    axes = figure_of(runs).axes
    limits = [panel.get_ylim() for panel in axes]
    assert limits[::2] == limits[1::2]
    assert axes[4].get_xlim() == axes[5].get_xlim()
    assert [legend_title(panel) for panel in axes[:2]] == ["runs/quiet", "runs/spiky"]


def threshold_labels(axes):
    return [text for text in axes.texts if isinstance(text, Annotation) and "%" in text.get_text()]


def test_the_distribution_counts_every_norm_that_has_a_logarithm():
    [stairs] = figure_of([run_of([0.0, NAN, INF, *spiky_norms()])]).axes[2].patches
    counts, edges, _ = stairs.get_data()
    assert counts[counts >= 1].sum() == STEPS
    assert (counts[np.searchsorted(edges, spiky_norms()[[100, 101, 300]]) - 1] >= 1).all()
    distribution = figure_of([run_of([NAN, 0.0])]).axes[2]
    assert [text.get_text() for text in distribution.texts] == ["no norm is finite and above 0"]


def test_thresholds_have_lines_and_the_share_that_they_would_clip():
    run = run_of(spiky_norms())
    distribution = figure_of([run]).axes[2]
    labels = threshold_labels(distribution)
    lines = sorted(line.get_xdata()[0] for line in distribution.get_lines())
    assert len(labels) == len(lines) >= 6
    for label, threshold in zip(labels, lines, strict=True):
        *_, number, share = label.get_text().split("\n")
        assert float(number) == pytest.approx(threshold, rel=0.01)
        assert (share, label.xy[0]) == (percent((run.norms > threshold).mean()), threshold)
    assert not any(label.get_text().startswith("\n") for label in labels)
    assert {label.get_rotation() for label in labels} == {0}
    narrow = figure_of([cramped(), cramped()]).axes[4]
    assert {label.get_rotation() for label in threshold_labels(narrow)} == {90}


def test_the_map_shows_the_largest_norm_of_each_interval(monkeypatch):
    monkeypatch.setattr(heat_map, "MOST_COLUMNS", 10)
    norms = np.ones(100)
    norms[57] = 1000.0
    shown = heat_map_of(run_of(norms), norms_of_parameters(norms, ["a", "b"]))
    assert shown.norms[:, 5].tolist() == pytest.approx([1000 * math.sqrt(2 / 3), 1000 * 3**-0.5])
    assert (np.delete(shown.norms, 5, axis=1) < 1).all()
    assert shown.edges.tolist() == [column * 10 - 0.5 for column in range(11)]


def test_the_map_shows_the_largest_shares_in_the_order_of_the_log():
    names = names_of(161)
    sorted_norms = norms_of_parameters(noisy_norms(), names)
    order = np.random.default_rng(0).permutation(161).astype(np.int32)
    indices = np.argsort(order)[sorted_norms.name_indices]
    mixed_names = tuple(np.array(names)[order])
    mixed = LoggedParameterNorms(mixed_names, sorted_norms.steps, indices, sorted_norms.norms)
    shown = heat_map_of(run_of(noisy_norms()), mixed)
    assert [*shown.names] == [name for name in mixed_names if name in names[:24]]
    axes = figure_of([run_of(noisy_norms(), parameters=mixed)]).axes[3]
    assert "24 of 161 logged parameters" in legend_title(axes)
    labels = [label.get_text().lstrip("…") for label in axes.get_yticklabels()]
    assert all(name.endswith(label) for name, label in zip(shown.names, labels, strict=True))


def test_a_small_parameter_that_broke_a_step_is_shown():
    norms, parameters = noisy_norms(), norms_of_parameters(noisy_norms(), names_of(60))
    parameters.norms[(parameters.steps == 200) & (parameters.name_indices == 59)] = NAN
    norms[200] = NAN
    shown = heat_map_of(run_of(norms), parameters)
    assert shown.names[-1] == names_of(60)[59]
    assert np.argwhere(shown.nonfinite).tolist() == [[23, 200]]


def test_norms_that_are_not_finite_or_not_logged_have_their_own_colours():
    steps, indices = np.array([0, 0, 4, 8]), np.array([0, 1, 0, 1], np.int32)
    parameters = LoggedParameterNorms(("a", "b"), steps, indices, np.array([1.0, 0.0, NAN, 2.0]))
    run = run_of(np.ones(9), parameters=parameters)
    shown = heat_map_of(run, parameters)
    assert np.array_equal(shown.norms, [[1, NAN, NAN], [0, NAN, 2]], equal_nan=True)
    assert shown.nonfinite.tolist() == [[False, True, False], [False, False, False]]
    assert shown.edges.tolist() == [-0.5, 3.5, 7.5, 11.5]
    axes = figure_of([run]).axes[3]
    assert legend_texts(axes) == ["not finite", "not logged"]
    cells, marks = axes.collections
    colors = [to_hex(color) for color in cells.to_rgba(cells.get_array()).reshape(-1, 4)]
    assert colors[1] == colors[2] == colors[4] == "#d9d9d9"
    assert colors[3] == colors[0]  # of 0: the lowest colour
    assert len({colors[0], colors[5], "#d9d9d9"}) == 3
    assert marks.get_array().mask.ravel().tolist() == [True, False, True, True, True, True]


def test_colours_end_at_the_largest_norm_and_begin_above_a_few_tiny_ones():
    norms = noisy_norms(1000)
    norms[:5], norms[500] = 1e-200, 1e6
    both = (norms, noisy_norms(1000, 1))
    low, high = color_range([heat_map_of(run_of(n), norms_of_parameters(n, "a")) for n in both])
    assert high == pytest.approx(6)
    assert -1 < low < 0


def test_a_run_without_parameters_leaves_the_place_of_its_map_empty():
    figure = figure_of([run_of(noisy_norms()), of_parameters(noisy_norms())])
    assert [axes.get_visible() for axes in figure.axes[6:8]] == [False, True]
    assert len(figure.axes) == 9  # with the colour bar
    assert len(figure_of([run_of(noisy_norms())]).axes) == 3


@pytest.mark.parametrize("count", [2 * COLUMNS, 2 * COLUMNS + 1, 50_000])
def test_a_long_curve_keeps_every_spike_and_gap(count):
    values, spikes = noisy_norms(count), [0, count // 3, count - 1]
    values[spikes], values[count // 2] = [1e3, 2e3, 3e3], 1e-3
    values[count // 4 : count // 4 + 200] = NAN
    shown = envelope(np.arange(count) * 3 + 7, values)
    assert len(shown.steps) <= 2 * COLUMNS
    assert np.isnan(shown.high).any()
    columns = np.searchsorted(shown.steps, np.array(spikes) * 3 + 7)
    for column, height in zip(columns, (1e3, 2e3, 3e3), strict=True):
        assert height in shown.high[max(column - 1, 0) : column + 2]
    assert (np.nanmax(shown.line[1]), np.nanmin(shown.line[1])) == (3e3, 1e-3)
    marks = thinned(np.arange(count) + 5)
    assert len(marks) <= COLUMNS + 1
    assert (marks[0], np.diff(marks).max()) == (5, -(-(count - 1) // COLUMNS))


@pytest.mark.parametrize(
    ("norms", "word"), [(noisy_norms(), "advised"), (spiky_norms(), "if fixed")]
)
def test_the_number_of_the_advice_stands_out(norms, word):
    """It is advised where the line has it, and else what would do instead."""
    run = run_of(norms)
    labels = threshold_labels(figure_of([run]).axes[2])
    [label] = [label for label in labels if label.get_fontweight() == "bold"]
    advice = advised(run, summarized(run))
    assert label.get_text().startswith(f"{word}\n")
    assert label.xy[0] == advice.threshold
    assert (advice.line == f"GradientClipper(optimizer, {label.xy[0]:g})") == (word == "advised")


def test_a_million_steps_are_drawn_in_seconds():
    norms = np.tile(noisy_norms(10_000), 100)
    norms[777_777] = 1e5
    run = run_of(norms, threshold=np.tile([3.0, 2.0], 500_000))
    advice = [advised(run, summarized(run))]
    begun = time.perf_counter()
    figure = figure_of([run], advice)
    assert time.perf_counter() - begun < 20  # 3 s on an idle machine
    norms = figure.axes[0]
    assert curve(norms, "before").get_ydata().max() == 1e5
    assert curve(norms, "threshold").get_ydata().min() == 3
    [lowest] = [line for line in norms.get_lines() if line.get_label() == "_"]
    assert lowest.get_ydata().max() == 2


@pytest.mark.slow
def test_the_same_runs_make_the_same_bytes(tmp_path):
    for ending in ("svg", "png"):
        first, second = (tmp_path / f"{name}.{ending}" for name in "ab")
        draw([exploding_run()], first)
        draw([exploding_run()], second)
        assert first.read_bytes() == second.read_bytes()


def test_a_link_stays_one_and_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    (tmp_path / "link.png").symlink_to("a.png")
    draw([run_of([1.0])], tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        draw([run_of([1.0])], path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "link.png"]
    assert path.read_bytes() == old
    for other in (3, b"a.png", None):
        with pytest.raises(ArgumentError, match=f"path is a {type(other).__name__}: give a path"):
            draw([run_of([1.0])], other)


def test_matplotlibs_global_state_is_neither_changed_nor_used(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 33, "text.usetex": True}):
        before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
        figure = draw([run_of(noisy_norms())], tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert figure.dpi == 100
    assert curve(figure.axes[0], "before").get_linewidth() == 1
