"""Charts, curves and settings that TensorBoard draws of a demo run, in a browser."""

import os
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
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--steps", str(STEPS), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def server(demo_run):
    with tensorboard(demo_run, demo_run / "messages") as server:
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


def test_every_chart_shows_each_point_of_the_log(page, server, demo_run):
    """The overlay, enlarged and with its legend open, is drawn in a colour for each run."""
    page.show(server.address, OVERLAY, names_in(OVERLAY, *RUNS))
    curves = sum(len(RUNS) * len(names) for names in CHARTS.values())
    charts = page.until(
        page.curves,
        lambda charts: sum(map(len, charts.values())) >= curves,
        f"{curves} curves in all charts",
    )
    assert charts == {title: in_the_log(demo_run, RUNS, title) for title in CHARTS}
    assert {len(points) for chart in charts.values() for points in chart.values()} == {STEPS}
    lines = page.until(
        lambda: page.lines(OVERLAY),
        lambda lines: all(vertices >= STEPS for _, vertices in lines.values()),
        f"{STEPS} points of each line",
    )
    assert lines.keys() == names_in(OVERLAY, *RUNS)
    assert {vertices for _, vertices in lines.values()} == {STEPS}
    colours = {(name.rpartition(" ")[2], colour) for name, (colour, _) in lines.items()}
    assert len(colours) == len(dict(colours)) == len({colour for _, colour in colours}) == len(RUNS)
    page.picture(Path(os.environ.get("GRADCLIP_ARTEFACTS") or ARTEFACTS) / "custom_scalars.png")


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
