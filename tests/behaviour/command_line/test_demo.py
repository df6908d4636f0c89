"""The demo: with a few steps, and in full where marked slow."""

import functools
import io
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import matplotlib
import pytest
import torch
from PIL import Image

from gradclip.cli import main
from gradclip.cli.demo.options import CELLS, LOG_SUFFIX, Options
from gradclip.cli.demo.picture import draw
from gradclip.cli.demo.progress import Bars, Lines, progress
from gradclip.cli.demo.run import show_table
from gradclip.cli.demo.task import read_text, seeded_model
from gradclip.cli.demo.training import Curves
from tests.support.curves import TAGS, steps_in, values_in

NAN, INF = math.nan, math.inf
PARAMETERS = dict(seeded_model("rnn-tanh", 9, 0).named_parameters())
text = functools.cache(read_text)


def is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        return (image.format, image.size) == ("PNG", (900, 600))


@pytest.fixture
def hide(monkeypatch):
    """Make a package look as if it were not installed."""

    def hide(package: str) -> None:
        for name in [package, *sys.modules]:
            if name.split(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)

    return hide


class Done(NamedTuple):
    """The results of a demo."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def curves(self) -> list[dict[str, list[float]]]:
        """The curves without and with clipping."""
        return [values_in(self.folder / run) for run in ("unclipped", "clipped")]


@pytest.fixture
def demo(tmp_path, capsys, monkeypatch):
    """Run the demo with a few steps; without its picture, to be quick."""

    def demo(*arguments: str, steps: int = 3, folder: str = "out", picture: bool = False) -> Done:
        path = tmp_path / folder
        with monkeypatch.context() as patch:
            patch.setattr("gradclip.cli.demo.run.read_text", text)
            if not picture:
                patch.setattr("gradclip.cli.demo.run.draw", lambda runs, options: None)
            code = main(["demo", "--steps", str(steps), "--out", str(path), *arguments])
        return Done(code, *capsys.readouterr(), path)

    return demo


def test_it_logs_every_step_and_says_where(demo):
    done = demo(steps=5, picture=True)
    assert done.code == 0
    tags = {"loss", *TAGS, *(f"parameter_norm/{name}" for name in PARAMETERS)}
    for run in ("unclipped", "clipped"):
        assert steps_in(done.folder / run) == {tag: [0, 1, 2, 3, 4] for tag in tags}
        assert values_in(done.folder / run)["grad_norm/threshold"] == [1.0] * 5
    unclipped, clipped = done.curves
    for tag in ("loss", "grad_norm/pre"):
        assert unclipped[tag][0] == clipped[tag][0]  # the same weights and batch
    for words in ("final loss", "largest norm", "clip rate", "steps/s", " clipping"):
        assert words in done.out
    assert f"Picture: {done.folder / 'demo.png'}\n" in done.out
    assert f" --logdir {shlex.quote(str(done.folder))}\n" in done.out
    assert is_picture(done.folder / "demo.png")
    files = sorted(path.name for path in done.folder.iterdir())
    assert files == ["clipped", "demo.html", "demo.png", "unclipped"]
    assert f"Page:    {done.folder / 'demo.html'} (open it in a browser)\n" in done.out
    page = (done.folder / "demo.html").read_text(encoding="utf-8")
    for run in ("unclipped", "clipped"):
        assert f'"name": "{done.folder / run}"' in page
    assert [path.name for path in done.folder.parent.iterdir()] == ["out"]


def test_the_first_run_observes_and_the_second_clips(demo):
    low, high, zero = (demo("--max-norm", limit, folder=limit) for limit in ("0.01", "1e9", "0"))
    unclipped, clipped = low.curves
    assert high.curves[0]["loss"] == high.curves[1]["loss"] == unclipped["loss"]
    assert clipped["loss"][1:] != unclipped["loss"][1:]
    for run in low.curves:  # an observed norm after clipping is what clipping would have made
        assert run["grad_norm/post"] == pytest.approx([0.01] * 3)
    assert zero.curves[1]["grad_norm/post"] == [0.0] * 3


@pytest.mark.parametrize("cell", CELLS)
def test_every_network_learns_with_clipping(demo, cell):
    done = demo("--cell", cell, steps=8)
    losses = done.curves[1]["loss"]
    assert cell in done.out
    assert min(losses) < losses[0] - 0.3


def test_a_run_that_ends_in_nan_is_shown_so(demo, monkeypatch):
    monkeypatch.setattr("gradclip.cli.demo.task.GAIN", 1e6)  # the first step overflows
    done = demo("--cell", "rnn-relu", picture=True)
    assert done.code == 0
    assert math.isnan(done.curves[0]["loss"][-1])
    assert "NaN/inf" in done.out
    assert is_picture(done.folder / "demo.png")


def test_the_seed_decides_every_number(demo):
    """Whatever the number of threads and the caller's random numbers, which stay as they are."""
    threads = torch.get_num_threads()
    one = demo(folder="one", steps=12)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    try:
        torch.set_num_threads(3)
        again = demo(folder="again", steps=12)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.curves == again.curves
    assert demo("--seed", "5", folder="other").curves[1]["loss"] != one.curves[1]["loss"][:3]


def test_it_prints_how_to_call_tensorboard(demo, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    [line] = re.findall("^Curves: (.*)", demo(steps=1).out, re.MULTILINE)
    [path, *_] = shlex.split(line)
    assert os.path.isabs(path)
    assert os.access(path, os.X_OK)
    (tmp_path / "tensorboard").write_text("#!/bin/sh\n")
    (tmp_path / "tensorboard").chmod(0o755)
    assert "Curves:  tensorboard --logdir" in demo(steps=1).out
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert f"{shlex.quote(sys.executable)} -m tensorboard.main" in demo(steps=1).out


def test_without_matplotlib_an_old_picture_is_said_to_be_old(demo, hide, tmp_path):
    hide("matplotlib")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/demo.png").write_text("old")
    done = demo(picture=True, steps=1)
    assert f"({tmp_path / 'out/demo.png'} belongs to an earlier demo)" in done.out


def test_a_second_demo_replaces_only_the_logs_of_the_first(demo):
    folder = demo(steps=6, folder="[a]*").folder  # characters with a meaning in patterns
    events = "events.out.tfevents.1.host.2.3"
    names = [events, f"{events}{LOG_SUFFIX}", f"mine/{events}{LOG_SUFFIX}", f"unclipped/{events}"]
    names += [f"clipped/{events}.v2", f"clipped/mine{LOG_SUFFIX}"]
    theirs = [folder / name for name in names]
    (folder / "mine").mkdir()
    for path in theirs:
        path.write_text("theirs")
    demo(steps=4, folder="[a]*")
    for path in theirs:
        assert path.read_text() == "theirs"
        path.unlink()
    assert len(values_in(folder / "clipped")["loss"]) == 4
    assert len(list((folder / "unclipped").iterdir())) == 1


def test_an_interrupt_leaves_the_logs_so_far(demo, monkeypatch):
    interrupted = Mock(side_effect=[None] * 6 + [KeyboardInterrupt])
    monkeypatch.setattr(Lines, "advance", interrupted)
    done = demo(steps=5)
    last = f"gradclip demo: interrupted; the logs so far are in {done.folder}"
    assert (done.code, done.err.splitlines()[-1]) == (130, last)
    counts = [(len(run["loss"]), len(run["grad_norm/pre"])) for run in done.curves]
    assert counts == [(5, 5), (2, 2)]


def test_a_full_disk_ends_it_with_a_line(demo, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", Mock(side_effect=full))
    done = demo()
    assert done.code == 1
    said = "gradclip demo: stopped, a file cannot be written.*No space left on device"
    assert re.match(said, done.err.splitlines()[-1])


@pytest.mark.slow
def test_the_default_demo_shows_an_explosion_and_the_use_of_clipping(tmp_path):
    """The explosion begins in the recurrent weights."""
    command = [sys.executable, "-W", "error", "-m", "gradclip", "demo"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    unclipped, clipped = Done(done.returncode, "", "", tmp_path / "demo").curves
    assert done.returncode == 0, done.stderr
    assert len(unclipped["loss"]) == len(clipped["loss"]) == 300
    last, last_clipped = (sum(run["loss"][-10:]) / 10 for run in (unclipped, clipped))
    assert last_clipped < 2.5
    assert last > 1.25 * last_clipped
    norms, prefix = unclipped["grad_norm/pre"], "parameter_norm/"
    # Its first step: later ones, and their heights, depend on the processor, whose roundings grow.
    first = next(step for step, norm in enumerate(norms) if norm > 100)
    begin = {tag.removeprefix(prefix): v[first] for tag, v in unclipped.items() if prefix in tag}
    assert max(begin, key=begin.__getitem__).startswith("recurrent.weight")
    assert begin["head.weight"] < 0.5 * norms[first]
    assert max(clipped["grad_norm/post"]) <= 1 + 1e-6
    assert is_picture(tmp_path / "demo/demo.png")


def curves_of(losses, norms, *, clips=False):
    run = "clipped" if clips else "unclipped"
    return Curves(run, clips=clips, losses=losses, norms=norms, clip_rate=0.5, seconds=2.0)


def test_the_table_is_the_same_with_and_without_rich(hide):
    """Final loss: the mean of the last ten. Largest norm: the largest finite one."""
    runs = [
        curves_of([4.0, NAN], [7e6, NAN, INF]),
        curves_of([9.0] * 5 + [4.0, 1.5] * 5, [2.0, 0.5], clips=True),
    ]
    rich, plain = io.StringIO(), io.StringIO()
    show_table(runs, 1.0, rich)
    hide("rich")
    show_table(runs, 1.0, plain)
    assert plain.getvalue().splitlines() == [
        "                  final loss      largest norm  clip rate  steps/s",
        "without clipping         NaN  7e+06, 2 NaN/inf      (50%)        1",
        "with clipping           2.75                 2        50%        8",
        "Final loss: mean of all steps. Clip rate: share of the finite norms above 1",
        "(in brackets: observed only, no gradient was changed).",
    ]
    assert "┃" in rich.getvalue()
    assert [w for w in rich.getvalue().split() if w.isascii()] == plain.getvalue().split()
    show_table(runs[1:], 1.0, plain)
    assert "mean of the last 10 steps" in plain.getvalue()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def followed(stream, steps):
    with progress(stream) as shown:
        for title in ("one", "two"):
            shown.begin(title, steps)
            for _ in range(steps):
                shown.advance(2.0)
    return stream.getvalue()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 1000])
def test_progress_in_a_file_is_at_most_four_lines_a_run(steps):
    lines = followed(io.StringIO(), steps).splitlines()
    assert len(lines) == 2 * min(steps, 4)
    assert lines[-1] == f"two: {steps}/{steps} steps, loss 2"
    if steps == 1000:
        assert lines[0] == "one: 250/1000 steps, loss 2"


def test_progress_in_a_terminal_is_a_bar_or_a_line_that_is_rewritten(hide, monkeypatch):
    assert isinstance(progress(Terminal()), Bars)
    assert "5/5" in followed(Terminal(), 5)
    hide("rich")
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock) / 50)  # 20 ms a step
    printed = followed(Terminal(), 100)
    assert printed.count("\n") == 2
    assert 20 < printed.count("\r") < 60
    assert "one: 100/100 steps, loss 2" in printed
    with progress(stream := Terminal()) as shown:  # ends early, within a line
        shown.begin("one", 100)
        for _ in range(10):
            shown.advance(2.0)
    assert stream.getvalue().endswith("\n")


NUMBERS = {
    "one step": ([3.0], [1.0], [3.0], [1.0]),
    "NaN only": ([NAN] * 3,) * 4,
    "infinite": ([3.0, INF, NAN], [1.0, INF, NAN], [3.0, 2.0, 1.0], [1.0, INF, 0.5]),
    "zeros": ([0.0] * 3, [0.0] * 3, [0.0] * 3, [0.0, 0.0, 1.0]),
    "huge": ([4.0, 1e37, 3e38], [1.0, 1e37, 1e38], [4.0, 3.0, 2.0], [1e-38, 1.0, 2.0]),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e-300, 1e305])
def test_the_picture_bears_any_numbers(tmp_path, name, max_norm):
    losses, norms, *clipped = NUMBERS[name]
    options = Options(out=str(tmp_path), max_norm=max_norm)
    draw([curves_of(losses, norms), curves_of(*clipped, clips=True)], options)
    assert is_picture(tmp_path / "demo.png")


def test_the_picture_has_both_colours_and_uses_no_global_state(tmp_path):
    unclipped = curves_of([4.0, 20, 15], [1.0, 1e4, 1e2])
    with matplotlib.rc_context({"lines.linewidth": 9, "figure.dpi": 33}):
        before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
        clipped = curves_of([4.0, 3, 2], [1.0, 2, 1], clips=True)
        draw([unclipped, clipped], Options(out=str(tmp_path)))
        assert dict(matplotlib.rcParams) == before
        assert ("matplotlib.pyplot" in sys.modules) == loaded
    colours = Image.open(tmp_path / "demo.png").convert("RGB").getcolors(1 << 20)
    counted = {colour: count for count, colour in colours}
    assert min(counted[0xD5, 0x5E, 0x00], counted[0x00, 0x72, 0xB2]) > 300
