"""That the picture of runs can be read, and that nothing keeps it from being."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from gradclip import ArgumentError
from gradclip.report.pictures import picture
from gradclip.report.pictures.distribution import percent, separated
from gradclip.report.pictures.picture import draw, figure_of
from gradclip.report.pictures.style import (
    drawable,
    log_limits,
    log_tick_label,
    log_ticks,
    short_names,
)
from tests.report.pictured import (
    NAN,
    OKABE_ITO,
    PICTURES,
    curve,
    exploding,
    noise,
    run_of,
)

QUICK = ("spiky", "exploding beside quiet", "odd names")


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PICTURES
    ]
)
def runs(request):
    return PICTURES[request.param]()


def boxes_of(texts):
    shown = [each for each in texts if each.get_visible() and each.get_text()]
    return [Text.get_window_extent(each).padded(-0.5) for each in shown]


def labels_in_sight(axis):
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]


def overlapping(boxes):
    return [
        (one, other)
        for place, one in enumerate(boxes)
        for other in boxes[:place]
        if one.overlaps(other)
    ]


def test_every_picture_can_be_read(runs):
    figure = figure_of(runs)
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    every_text = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        panel = axes.bbox
        on_x, on_y = map(labels_in_sight, (axes.xaxis, axes.yaxis))
        assert not overlapping(boxes_of(on_x))
        assert not overlapping(boxes_of(on_y))
        legend = axes.get_legend()
        texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        if legend is not None:
            assert legend.get_window_extent().y0 >= panel.y1 - 1
            texts += [*legend.get_texts(), legend.get_title()]
        # What stands around one panel does not run into what stands around another.
        every_text += boxes_of([*texts, *on_x])
        for text in [*texts, *on_x, *on_y]:
            if text.get_text() and text.get_visible():
                assert text.get_fontsize() >= 9
                box = Text.get_window_extent(text)
                assert whole.contains(box.x0, box.y0), text
                assert whole.contains(box.x1, box.y1), text
    assert not overlapping(every_text)
    for norms in figure.axes[: len(runs)]:
        labels = [label.get_text() for label in labels_in_sight(norms.yaxis)]
        assert 2 <= len({*labels}) == len(labels) <= 12


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.9, 1.1), (0.5, 3), (1, 9), (1e-3, 1e5), (1e-300, 1e300), (3e7, 4e8), (1e-307, 1e-305)],
)
def test_ticks_are_round_numbers_between_the_limits(low, high):
    low, high = log_limits(np.array([low, NAN, high]))
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 10
    assert ticks == sorted(ticks)
    assert all(low <= tick <= high for tick in ticks)
    assert all(tick == float(f"{tick:.1e}") for tick in ticks)


def test_labels_of_ticks_are_numbers_or_powers():
    assert log_tick_label(1000.0, plain=True) == "1000"
    assert log_tick_label(0.25, plain=True) == "0.25"
    assert log_tick_label(1e-12, plain=False) == "$10^{-12}$"


def test_colours_are_those_that_the_colour_blind_tell_apart():
    figure = figure_of([exploding()])
    colours = {to_hex(line.get_color()) for axes in figure.axes[:3] for line in axes.get_lines()}
    grey = {colour for colour in colours if colour[1:3] == colour[3:5] == colour[5:7]}
    assert len(colours - grey) == 4
    assert colours - grey <= OKABE_ITO
    assert figure.axes[3].collections[0].get_cmap().name == "viridis"


@pytest.mark.parametrize("count", [1, 2, 9, 40])
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_moved_apart_and_no_further(count, seed):
    random = np.random.default_rng(seed)
    wanted = np.sort(random.uniform(0, 600, count))
    widths = random.uniform(5, 12, count)
    centers = separated(wanted, widths, 600)
    assert (np.diff(centers) >= (widths[1:] + widths[:-1]) / 2 - 1e-9).all()
    assert centers[0] - widths[0] / 2 >= -1e-9
    assert centers[-1] + widths[-1] / 2 <= 600 + 1e-9
    apart = separated(np.array([100.0, 300.0, 500.0]), np.full(3, 50.0), 600)
    assert apart.tolist() == [100, 300, 500]
    assert separated(np.array([300.0, 300.0]), np.full(2, 50.0), 600).tolist() == [275, 325]


def test_names_are_shortened_where_they_do_not_differ():
    assert short_names(["a", "b"], 10, "/") == ["a", "b"]
    long = [f"experiments/of/today/learning_rate_{n}/logs" for n in range(2)]
    assert short_names(long, 24, "/") == ["…learning_rate_0/logs", "…learning_rate_1/logs"]
    for names in (
        [f"{'x' * 50}{n}" for n in range(3)],
        [f"{n}{'x' * 50}" for n in range(3)],
        [f"{'x' * 50}{n}{'y' * 50}" for n in range(3)],
        ["same" * 20, "same" * 20, "other" * 20],
    ):
        short = short_names(names, 12, "/")
        assert max(map(len, short)) <= 12
        assert len({*short}) == len({*names})
    assert short_names(["a/" * 20 + "end"], 12, "/")[0].endswith("end")


def test_names_show_what_has_no_glyph_as_python_would():
    assert drawable("a/b.weight äé…") == "a/b.weight äé…"
    assert drawable("a\nb\x00\udc80中") == "a\\nb\\x00\\udc80\\u4e2d"


def test_percent_has_two_digits():
    shares = (0, 0.00012, 0.0123, 0.456, 0.994, 0.9999, 1)
    assert [*map(percent, shares)] == ["0%", "0.012%", "1.2%", "46%", "99.4%", "100%", "100%"]


# Files


def test_every_picture_is_a_file_of_its_kind(tmp_path, runs):
    advice = [picture.advised(run, picture.summarized(run)) for run in runs]
    draw(runs, tmp_path / "a.PNG", advice)
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    draw(runs, tmp_path / "a.svg", advice)
    root = ElementTree.fromstring((tmp_path / "a.svg").read_bytes())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.PNG", "a.svg"]


@pytest.mark.slow
def test_the_same_runs_make_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw([exploding()], tmp_path / name)
    for ending in ("svg", "png"):
        first, second = ((tmp_path / f"{name}.{ending}").read_bytes() for name in "ab")
        assert first == second


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("a.pdf", "ends with .png or .svg"),
        ("a", "ends with .png or .svg"),
        ("a\0.png", "ends with .png or .svg"),
        ("folder.png", "is a folder"),
        ("nowhere/a.png", "There is no folder .*nowhere"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(tmp_path, name, what):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ArgumentError, match=what):
        draw([run_of(noise())], f"{tmp_path}/{name}")
    assert [each.name for each in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("path", [3, b"a.png", None])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ArgumentError, match=f"path is a {type(path).__name__}: give a path"):
        draw([run_of(noise())], path)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        draw([run_of([1.0])], path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link.png").symlink_to("target.png")
    draw([run_of([1.0])], tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").stat().st_size > 1000


def test_too_many_runs_are_refused():
    with pytest.raises(ArgumentError, match="Found 13 runs: a picture has room for 12"):
        figure_of([run_of([1.0])] * 13)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for make in (
        lambda: draw([run_of([1.0])], tmp_path / "a.png"),
        lambda: figure_of([run_of([1])]),
    ):
        with pytest.raises(ImportError, match=r'pip install "gradclip\[report\]"'):
            make()
    assert not [*tmp_path.iterdir()]


def test_no_global_state_of_matplotlib_is_touched_or_believed(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 33, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        loaded = "matplotlib.pyplot" in sys.modules
        figure = draw([run_of(noise())], tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == loaded
    assert figure.dpi == 100
    assert curve(figure.axes[0], "before").get_linewidth() == 1
