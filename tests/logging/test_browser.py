"""Charts and curves that TensorBoard draws of a demo run, in a browser."""

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
SAMPLE = 1000
"""Points of a curve that TensorBoard keeps when it is not told otherwise."""

ARTEFACTS = Path(__file__).parents[2] / "build" / "artefacts"


@pytest.fixture(scope="module")
def page():
    with chromium(1400, 900) as page:
        yield page


def wait_for(server, *runs, last):
    """Wait until a server has read some runs up to a step."""

    def newest(run, tag):
        points = server.ask("data/plugin/scalars/scalars", run=run, tag=tag)
        return bool(points) and points[-1][1] == last

    for run in runs:
        for name in NAMES:
            eventually(lambda run=run, tag=f"grad_norm/{name}": newest(run, tag))


def in_the_log(folder, runs, title):
    """Return the curves that a chart should show, by the names that TensorBoard gives them."""
    logs = {run: curves_in(folder / run) for run in runs}
    return {
        f"grad_norm/{name} ({run})": [(p.step, p.value) for p in log[f"grad_norm/{name}"]]
        for run, log in logs.items()
        for name in CHARTS[title]
    }


def test_every_chart_shows_each_point_of_the_log(page, tmp_path):
    """The overlay, enlarged and with its legend open, is drawn in a colour for each run."""
    assert main(["demo", "--steps", str(STEPS), "--out", str(tmp_path)]) == 0
    logged = {title: in_the_log(tmp_path, RUNS, title) for title in CHARTS}
    with tensorboard(tmp_path, tmp_path / "messages") as server:
        wait_for(server, *RUNS, last=STEPS - 1)
        page.show(server.address, OVERLAY, logged[OVERLAY].keys())
        charts = page.until(
            page.curves,
            lambda charts: sum(map(len, charts.values())) >= sum(map(len, logged.values())),
            "the curves of all charts",
        )
        lines = page.until(
            lambda: page.lines(OVERLAY),
            lambda lines: all(vertices >= STEPS for _, vertices in lines.values()),
            f"{STEPS} points of each line",
        )
    assert charts == logged
    assert {len(points) for chart in charts.values() for points in chart.values()} == {STEPS}
    assert lines.keys() == logged[OVERLAY].keys()
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
        page.show(server.address, OVERLAY, logged.keys())
        shown = page.curves()[OVERLAY]
    assert {name: len(points) for name, points in shown.items()} == dict.fromkeys(logged, kept)
    for name, points in shown.items():
        assert set(points) <= set(logged[name])
        assert points[-1] == logged[name][-1]
