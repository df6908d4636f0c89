"""The parts of the demo, each alone."""

from __future__ import annotations

import io
import math
import sys

import pytest
import torch
from torch import nn

from gradclip.cli.demo.curves import Curves
from gradclip.cli.demo.options import CELLS, Options
from gradclip.cli.demo.picture import draw
from gradclip.cli.demo.progress import Bars, Lines, progress
from gradclip.cli.demo.run import show_table
from gradclip.cli.demo.task import GAIN, HIDDEN, Text, batches, read_text, seeded_model
from gradclip.report.printing import number

NAN, INF = math.nan, math.inf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def curves_of(losses, norms, *, clips=False):
    run = "clipped" if clips else "unclipped"
    return Curves(run, clips=clips, losses=losses, norms=norms, clip_rate=0.5, seconds=2.0)


# Text


def test_the_text_is_long_and_spelt_with_its_alphabet():
    text = read_text()
    assert len(text.characters) > 300_000
    assert 60 < len(text.alphabet) < 1000
    assert int(text.characters.max()) == len(text.alphabet) - 1
    spelt = "".join(text.alphabet[i] for i in text.characters.tolist())
    assert "statement" in spelt


def test_batches_are_sequences_and_what_follows_them():
    text = Text(torch.arange(1000), "")
    for inputs, targets in batches(text, steps=3, seed=0):
        assert inputs.shape == targets.shape == (32, 100)
        assert torch.equal(inputs[:, 1:], inputs[:, :1] + torch.arange(1, 100))
        assert torch.equal(targets, inputs + 1)


def test_batches_reach_both_ends_of_the_text():
    text = Text(torch.arange(102), "")
    starts = {int(start) for inputs, _ in batches(text, 3, 0) for start in inputs[:, 0]}
    assert starts == {0, 1}


# Model


@pytest.mark.parametrize("cell", CELLS)
def test_every_recurrent_matrix_is_orthogonal(cell):
    model = seeded_model(cell, 7, seed=0)
    weights = model.recurrent.weight_hh_l0
    matrices = weights.split(HIDDEN)
    assert len(matrices) == {"lstm": 4, "gru": 3}.get(cell, 1)
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.T, GAIN**2 * torch.eye(HIDDEN))


@pytest.mark.parametrize(
    ("cell", "kind", "mode"),
    [
        ("rnn-tanh", nn.RNN, "RNN_TANH"),
        ("rnn-relu", nn.RNN, "RNN_RELU"),
        ("lstm", nn.LSTM, "LSTM"),
        ("gru", nn.GRU, "GRU"),
    ],
)
def test_every_cell_is_torchs_own(cell, kind, mode):
    recurrent = seeded_model(cell, 7, seed=0).recurrent
    assert type(recurrent) is kind
    assert recurrent.mode == mode


# Curves


def test_the_final_loss_is_the_mean_of_the_last_ten():
    assert curves_of([100.0] * 5 + [1.0] * 5 + [3.0] * 5, []).final_loss == 2.0
    assert curves_of([1.0, 3.0], []).final_loss == 2.0
    assert math.isnan(curves_of([1.0] * 20 + [NAN], []).final_loss)


def test_the_largest_norm_is_the_largest_finite_one():
    curves = curves_of([], [1.0, NAN, 5.0, INF, 2.0])
    assert curves.largest_norm == 5.0
    assert curves.nonfinite_norms == 2
    assert math.isnan(curves_of([], [NAN]).largest_norm)


def test_numbers_have_three_digits():
    written = [number(value) for value in (1.9684, 29312.0, NAN, INF, 0.5)]
    assert written == ["1.97", "2.93e+04", "NaN", "inf", "0.5"]


# Table

RUNS = [
    curves_of([4.0, NAN], [7e6, NAN]),
    curves_of([4.0, 1.5], [2.0, 0.5], clips=True),
]


def test_the_table_without_rich_is_aligned(hide):
    hide("rich")
    stream = io.StringIO()
    show_table(RUNS, 1.0, stream)
    assert stream.getvalue().splitlines() == [
        "                  final loss      largest norm  clip rate  steps/s",
        "without clipping         NaN  7e+06, 1 NaN/inf      (50%)        1",
        "with clipping           2.75                 2        50%        1",
        "Final loss: mean of all steps. Clip rate: share of the finite norms above 1",
        "(in brackets: only observed, no gradient was changed).",
    ]


def test_the_table_with_rich_says_the_same(hide):
    rich, plain = io.StringIO(), io.StringIO()
    show_table(RUNS, 1.0, rich)
    hide("rich")
    show_table(RUNS, 1.0, plain)
    assert rich.getvalue() != plain.getvalue()
    words = [word for word in rich.getvalue().split() if word.isascii()]
    assert words == plain.getvalue().split()


# Progress


def follow(stream, steps, *, fail=False):
    with progress(stream) as shown:
        for title in ("one", "two"):
            shown.begin(title, steps)
            for _ in range(steps):
                shown.advance(2.0)
    return stream.getvalue()


def test_progress_outside_a_terminal_is_four_lines_a_run():
    lines = follow(io.StringIO(), 1000).splitlines()
    assert lines[:5] == [
        "one: 250/1000 steps, loss 2",
        "one: 500/1000 steps, loss 2",
        "one: 750/1000 steps, loss 2",
        "one: 1000/1000 steps, loss 2",
        "two: 250/1000 steps, loss 2",
    ]
    assert len(lines) == 8


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_progress_of_a_few_steps_ends_at_the_last(steps):
    lines = follow(io.StringIO(), steps).splitlines()
    assert lines[-1] == f"two: {steps}/{steps} steps, loss 2"
    assert len(lines) <= 8


def test_progress_in_a_terminal_is_a_bar():
    stream = Terminal()
    assert isinstance(progress(stream), Bars)
    shown = follow(stream, 5)
    assert "one" in shown
    assert "5/5" in shown


def test_progress_in_a_terminal_without_rich_is_one_line_a_run(hide, monkeypatch):
    hide("rich")
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) / 50)  # 20 ms a step
    stream = Terminal()
    assert isinstance(progress(stream), Lines)
    shown = follow(stream, 100)
    assert shown.count("\n") == 2
    assert 20 < shown.count("\r") < 60
    assert "one: 100/100 steps, loss 2" in shown


def test_a_run_that_stops_early_ends_its_line(hide):
    hide("rich")
    stream = Terminal()
    with progress(stream) as shown:
        shown.begin("one", 10)
        shown._shown -= 1
        shown.advance(2.0)
    assert stream.getvalue().endswith("\n")


# Picture


@pytest.mark.parametrize(
    ("unclipped", "clipped"),
    [
        (([3.0], [1.0]), ([3.0], [1.0])),
        (([NAN] * 3, [NAN] * 3), ([NAN] * 3, [NAN] * 3)),
        (([3.0, INF, NAN], [1.0, INF, NAN]), ([3.0, 2.0, 1.0], [1.0, INF, 0.5])),
        (([0.0] * 3, [0.0] * 3), ([0.0] * 3, [0.0, 0.0, 1.0])),
        (([4.0, 1e37, 3e38], [1.0, 1e37, 1e38]), ([4.0, 3.0, 2.0], [1e-38, 1.0, 2.0])),
    ],
    ids=["one step", "NaN only", "infinite", "zeros", "huge"],
)
@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e-300, 1e305])
def test_the_picture_bears_any_numbers(tmp_path, png_size, unclipped, clipped, max_norm):
    options = Options(out=str(tmp_path), max_norm=max_norm)
    draw([curves_of(*unclipped), curves_of(*clipped, clips=True)], options)
    assert png_size(tmp_path / "demo.png") == (900, 600)


def test_the_picture_shows_both_runs_in_their_colours(tmp_path):
    image = pytest.importorskip("PIL.Image")
    losses, norms = [4.0, 20.0, 15.0, 18.0], [1.0, 1e4, 1e2, 1e3]
    runs = [curves_of(losses, norms), curves_of([4.0, 3, 2, 2], [1.0, 2, 1, 1], clips=True)]
    draw(runs, Options(out=str(tmp_path)))
    assert 5_000 < (tmp_path / "demo.png").stat().st_size < 120_000
    counted = {
        colour: count
        for count, colour in image.open(tmp_path / "demo.png").convert("RGB").getcolors(1 << 20)
    }
    assert counted[0xD5, 0x5E, 0x00] > 300
    assert counted[0x00, 0x72, 0xB2] > 300


def test_the_picture_touches_no_global_state_of_matplotlib(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 33}):
        before = dict(matplotlib.rcParams)
        loaded = "matplotlib.pyplot" in sys.modules
        draw([curves_of([1.0, 2.0], [1.0, 2.0])] * 2, Options(out=str(tmp_path)))
        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == loaded
