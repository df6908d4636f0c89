"""Curves, charts and settings that a TensorBoard shows over HTTP."""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper
from tests.support.curves import TAGS
from tests.support.tensorboard import eventually, tensorboard

readers = pytest.mark.parametrize("load_fast", ["auto", "false"])
"""With TensorBoard's data server, and without it."""


@readers
def test_resumed_run_is_shown_with_each_step_once(tmp_path, training, load_fast):
    directory = tmp_path / "logs"
    mine = SummaryWriter(str(directory))
    for norm, first, last in ((4.0, 0, 70), (1.0, 50, 90)):
        run = training()
        with GradientClipper(run.optimizer, 2.0, log=directory) as clipper:
            clipper.steps = first
            run.take(*[norm] * (last - first))
            for step in range(first, last):
                mine.add_scalar("samples", step, 100 * step)
    mine.close()
    with tensorboard(directory, tmp_path / "messages", f"--load_fast={load_fast}") as server:

        def shown(tag, last):
            points = server.ask("data/plugin/scalars/scalars", tag=tag, run=".")
            return points if points[-1][1] == last else []  # it may still be loading

        points = eventually(lambda: shown("grad_norm/pre", 89))
        theirs = eventually(lambda: shown("samples", 8900))
        assert set(server.ask("data/plugin/scalars/tags")["."]) == {"samples", *TAGS}
    assert [(step, value) for _, step, value in points] == [
        (step, 4.0 if step < 50 else 1.0) for step in range(90)
    ]
    assert {step for _, step, _ in theirs} == {100 * step for step in range(90)}
    times = [wall_time for wall_time, _, _ in points]
    assert times == sorted(times)
    assert time.time() - 3600 < times[0] < time.time()


@readers
def test_charts_and_settings_of_runs_and_clippers_stay_apart(tmp_path, training, load_fast):
    directory = tmp_path / "logs"
    for name, threshold in (("a", 2.0), ("b", 3.0)):
        one, other = training(), training()
        with GradientClipper(one.optimizer, threshold, log=directory / name, exceed="skip"):
            one.take(4.0, 1.0)
            with GradientClipper(other.optimizer, None, log=directory / name):
                other.take(5.0)
    with tensorboard(directory, tmp_path / "messages", f"--load_fast={load_fast}") as server:

        def categories():
            return server.ask("data/plugin/custom_scalars/layout").get("category", [])

        shown = eventually(categories)
        assert [category["title"] for category in shown] == ["grad_norm", "grad_norm_2"]
        overlaid = {}
        for chart in shown[0]["chart"]:
            [tag] = chart["multiline"]["tag"]
            found = server.ask("data/plugin/custom_scalars/scalars", run="a", tag=tag)
            assert found["regex_valid"]
            overlaid[chart["title"]] = {
                name: [value for _, _, value in points]
                for name, points in found["tag_to_events"].items()
            }
        assert overlaid == {
            "norm before and after, threshold": {
                "grad_norm/pre": [4.0, 1.0],
                "grad_norm/post": [4.0, 1.0],
                "grad_norm/threshold": [2.0, 2.0],
            },
            "clip rate": {"grad_norm/clip_rate": [0.0, 0.0]},
            "steps not finite, steps skipped": {
                "grad_norm/nonfinite_steps": [0.0, 0.0],
                "grad_norm/skipped_steps": [1.0, 1.0],
            },
        }
        for run, tag, needed in (
            ("a", "grad_norm/settings", ["SGD", "Fixed(2.0)", "skip", "gradclip"]),
            ("b", "grad_norm/settings", ["SGD", "Fixed(3.0)", "skip", "gradclip"]),
            ("b", "grad_norm_2/settings", ["SGD", "Fixed(None)", "scale", "gradclip"]),
        ):
            [text] = server.ask("data/plugin/text/text", run=run, tag=tag)
            assert "<table>" in text["text"]
            assert all(word in text["text"] for word in needed)
