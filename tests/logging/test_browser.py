"""Charts and curves that TensorBoard draws of a demo run, in a browser."""

import os
from pathlib import Path

import pytest

from gradclip.cli import main
from gradclip.cli.demo.options import Options
from tests.support.browser import charts_in, missing, open_charts
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


def in_the_log(folder, runs, title):
    """Return the curves that a chart should show, by the names that TensorBoard gives them."""
    logs = {run: curves_in(folder / run) for run in runs}
    return {
        f"grad_norm/{name} ({run})": [(p.step, p.value) for p in log[f"grad_norm/{name}"]]
        for run, log in logs.items()
        for name in CHARTS[title]
    }


def drawn_charts(browser, folder, logged, *options, runs, last):
    """Return the charts of a folder once a server has read its runs and the overlay is drawn."""
    with tensorboard(folder, folder / "messages", *options) as server:

        def newest(run, name):
            tag = f"grad_norm/{name}"
            points = server.ask("data/plugin/scalars/scalars", run=run, tag=tag)
            return bool(points) and points[-1][1] == last

        for run in runs:
            for name in NAMES:
                eventually(lambda run=run, name=name: newest(run, name))
        open_charts(browser, server.address)

        def complete():
            charts = charts_in(browser)
            shown = all({*charts.get(title, ())} >= {*curves} for title, curves in logged.items())
            lines = charts.get(OVERLAY, {}).values()
            return charts if shown and all(line.vertices >= STEPS for line in lines) else None

        return eventually(complete)


def test_every_chart_shows_each_point_of_the_log(browser, tmp_path):
    """The lines of the overlay have a colour for each run."""
    assert main(["demo", "--steps", str(STEPS), "--out", str(tmp_path)]) == 0
    logged = {title: in_the_log(tmp_path, RUNS, title) for title in CHARTS}
    charts = drawn_charts(browser, tmp_path, logged, runs=RUNS, last=STEPS - 1)
    for title, curves in charts.items():
        assert {name: curve.points for name, curve in curves.items()} == logged[title]
        assert {len(curve.points) for curve in curves.values()} == {STEPS}
    overlay = charts[OVERLAY].items()
    assert {curve.vertices for _, curve in overlay} == {STEPS}
    colours = {(name.rpartition(" ")[2], curve.colour) for name, curve in overlay}
    assert len(colours) == len(dict(colours)) == len({colour for _, colour in colours}) == len(RUNS)
    folder = Path(os.environ.get("GRADCLIP_ARTEFACTS") or ARTEFACTS)
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(folder / "custom_scalars.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kept"), [((), SAMPLE), (("--samples_per_plugin=scalars=9999",), 1500)]
)
def test_of_a_long_run_a_sample_is_shown_unless_all_is_asked_for(browser, tmp_path, options, kept):
    log_run(tmp_path / "long", *map(float, range(1500)), max_norm=700.0)
    assert Options().steps < SAMPLE  # the demo is shown in full
    logged = {OVERLAY: in_the_log(tmp_path, ["long"], OVERLAY)}
    charts = drawn_charts(browser, tmp_path, logged, *options, runs=["long"], last=1499)
    assert charts[OVERLAY].keys() == logged[OVERLAY].keys()
    for name, points in logged[OVERLAY].items():
        shown = charts[OVERLAY][name].points
        assert (len(points), len(shown)) == (1500, kept)
        assert {*shown} <= {*points}
        assert shown[-1] == points[-1]
