"""Charts, curves and settings that TensorBoard draws of a demo run, in a browser."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest

from gradclip.cli import main
from gradclip.cli.demo.options import Options
from tests.support.browser import chromium, missing
from tests.support.curves import NAMES, curves_in, log_run
from tests.support.tensorboard import eventually, tensorboard

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

STEPS = 40
RUNS = ("unclipped", "clipped")
OVERLAY = "norm before and after, threshold"
CHARTS = {
    OVERLAY: ("pre", "post", "threshold"),
    "clip rate": ("clip_rate",),
    "steps not finite, steps skipped": ("nonfinite_steps", "skipped_steps"),
}
WINDOW = (1400, 900)
SAMPLE = 1000
"""Points of a curve that TensorBoard keeps when it is not told otherwise."""

ARTEFACTS = Path(__file__).parents[2] / "build" / "artefacts"


@pytest.fixture(scope="module")
def page():
    with chromium(*WINDOW) as page:
        yield page


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--steps", str(STEPS), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(demo):
    with tensorboard(demo, demo / "messages") as server:
        wait_for(server, *RUNS, last=STEPS - 1)
        yield server


def wait_for(server, *runs, last):
    """Wait until a server has read some runs up to a step."""

    def newest(run, tag):
        points = server.ask("data/plugin/scalars/scalars", run=run, tag=tag)
        return bool(points) and points[-1][1] == last

    for run in runs:
        for name in NAMES:
            eventually(lambda run=run, tag=f"grad_norm/{name}": newest(run, tag))


def names_in(title, *runs):
    """Return what TensorBoard calls the curves of a chart."""
    return {f"grad_norm/{name} ({run})" for run in runs for name in CHARTS[title]}


def in_the_log(folder, runs, title):
    """Return the curves that a chart should show."""
    logs = {run: curves_in(folder / run) for run in runs}
    return {
        f"grad_norm/{name} ({run})": [(p.step, p.value) for p in log[f"grad_norm/{name}"]]
        for run, log in logs.items()
        for name in CHARTS[title]
    }


@dataclass
class Seen:
    """What the charts were like, with the overlay enlarged and its legend open."""

    charts: dict[str, dict[str, list[tuple[int, float]]]]
    lines: dict[str, tuple[str, int]]
    labels: list[tuple[str, float, list[float]]]
    screenshot: Path
    chart: list[float]


@pytest.fixture(scope="module")
def seen(page, server):
    curves = sum(len(RUNS) * len(names) for names in CHARTS.values())
    page.show(server.address, OVERLAY, names_in(OVERLAY, *RUNS))
    charts = page.until(
        page.curves,
        lambda charts: sum(map(len, charts.values())) >= curves,
        f"{curves} curves in all charts",
    )
    lines = page.until(
        lambda: page.lines(OVERLAY),
        lambda lines: all(vertices >= STEPS for _, vertices in lines.values()),
        f"{STEPS} points of each line",
    )
    path = Path(os.environ.get("GRADCLIP_ARTEFACTS") or ARTEFACTS) / "custom_scalars.png"
    page.picture(path)
    place = page.place(OVERLAY, "vz-line-chart2")
    return Seen(charts, lines, page.labels(OVERLAY), path, place)


def test_every_chart_shows_each_point_of_the_log(seen, demo):
    assert seen.charts == {title: in_the_log(demo, RUNS, title) for title in CHARTS}
    assert {len(points) for chart in seen.charts.values() for points in chart.values()} == {STEPS}


def test_every_point_is_drawn_in_the_colour_of_its_run(seen):
    assert seen.lines.keys() == names_in(OVERLAY, *RUNS)
    assert {vertices for _, vertices in seen.lines.values()} == {STEPS}
    colours = {colour_of(run, seen) for run in RUNS}
    assert len(colours) == len(RUNS)


def colour_of(run, seen):
    [colour] = {colour for name, (colour, _) in seen.lines.items() if f"({run})" in name}
    return colour


def test_the_labels_can_be_read(seen):
    texts = [text for text, _, _ in seen.labels]
    assert OVERLAY in texts
    legend = [text for text in texts if text.endswith(")")]
    assert {text[2:] for text in legend} == names_in(OVERLAY, *RUNS)  # after a symbol and a space
    for run in RUNS:
        assert len({text[0] for text in legend if f"({run})" in text}) == 3, legend
    numbers = [text for text in texts if re.fullmatch(r"-?[\d.,]+(e[+-]?\d+)?[kM]?", text)]
    assert len(numbers) >= 6, f"the axes lack numbers: {texts}"
    for text, size, (left, top, width, height) in seen.labels:
        assert size >= 12, text
        assert 0 <= left < left + width <= WINDOW[0], text
        assert 0 <= top < top + height <= WINDOW[1], text
    for (text, _, place), (other, _, others_place) in combinations(seen.labels, 2):
        assert apart(place, others_place), f"{text!r} lies on {other!r}"


def apart(one, other):
    return any(
        one[side] + one[side + 2] <= other[side] or other[side] + other[side + 2] <= one[side]
        for side in (0, 1)
    )


def test_a_screenshot_shows_the_curves(seen):
    from PIL import Image

    left, top, width, height = seen.chart
    with Image.open(seen.screenshot) as picture:
        assert (picture.format, picture.size) == ("PNG", WINDOW)
        chart = picture.convert("RGB").crop((left, top, left + width, top + height))
    pixels = {colour: count for count, colour in chart.getcolors(2**24)}
    for run in RUNS:
        assert pixels.get(tuple(bytes.fromhex(colour_of(run, seen)[1:])), 0) > 200, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept"), [((), SAMPLE), (("--samples_per_plugin=scalars=9999",), 1500)]
)
def test_of_a_long_run_a_sample_is_shown_unless_all_is_asked_for(page, tmp_path, options, kept):
    log_run(tmp_path / "logs" / "long", *map(float, range(1500)), max_norm=700.0)
    assert Options().steps < SAMPLE  # the demo is shown in full
    logged = in_the_log(tmp_path / "logs", ["long"], OVERLAY)
    assert {len(points) for points in logged.values()} == {1500}
    with tensorboard(tmp_path / "logs", tmp_path / "messages", *options) as server:
        wait_for(server, "long", last=1499)
        page.show(server.address, OVERLAY, names_in(OVERLAY, "long"))
        shown = page.curves()[OVERLAY]
    assert {name: len(points) for name, points in shown.items()} == dict.fromkeys(logged, kept)
    for name, points in shown.items():
        assert set(points) <= set(logged[name])
        assert points[-1] == logged[name][-1]
