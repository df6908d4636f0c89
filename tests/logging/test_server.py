"""Curves, charts and settings that a TensorBoard shows over HTTP."""

import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper
from tests.support.curves import TAGS
from tests.support.tensorboard import eventually, tensorboard


@pytest.fixture(params=["auto", "false"])
def start(request, tmp_path):
    """Start a server on a directory, with TensorBoard's data server and without it."""
    options = tmp_path / "messages", f"--load_fast={request.param}"
    return lambda directory: tensorboard(directory, *options)


def test_resumed_run_is_shown_with_each_step_once(tmp_path, training, start):
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
    with start(directory) as server:

        def shown(tag, last):
            points = server.ask("data/plugin/scalars/scalars", tag=tag, run=".")
            return points if points[-1][1] == last else []  # it may still be loading

        points = eventually(lambda: shown("grad_norm/pre", 89))
        theirs = eventually(lambda: shown("samples", 8900))
        assert set(server.ask("data/plugin/scalars/tags")["."]) == {"samples", *TAGS}
    needed = [(step, 4.0 if step < 50 else 1.0) for step in range(90)]
    assert [(step, value) for _, step, value in points] == needed
    assert {step for _, step, _ in theirs} == {100 * step for step in range(90)}
    times = [wall_time for wall_time, _, _ in points]
    assert times == sorted(times)
    assert time.time() - 3600 < times[0] < time.time()


CURVES = {
    "norm before and after, threshold": {"pre": [4, 1], "post": [4, 1], "threshold": [2, 2]},
    "clip rate": {"clip_rate": [0, 0]},
    "steps not finite, steps skipped": {"nonfinite_steps": [0, 0], "skipped_steps": [1, 1]},
}


def test_charts_and_settings_of_runs_and_clippers_stay_apart(tmp_path, training, start):
    for name, threshold in (("a", 2.0), ("b", 3.0)):
        one, other, log = training(), training(), tmp_path / "logs" / name
        with (
            GradientClipper(one.optimizer, threshold, log=log, exceed="skip"),
            GradientClipper(other.optimizer, None, log=log),
        ):
            one.take(4.0, 1.0)
            other.take(5.0)
    with start(tmp_path / "logs") as server:
        layout = "data/plugin/custom_scalars/layout"
        categories = eventually(lambda: server.ask(layout).get("category", []))
        assert [category["title"] for category in categories] == ["grad_norm", "grad_norm_2"]
        assert [chart["title"] for chart in categories[0]["chart"]] == [*CURVES]
        for chart in categories[0]["chart"]:
            query = {"run": "a", "tag": chart["multiline"]["tag"][0]}
            found = server.ask("data/plugin/custom_scalars/scalars", **query)["tag_to_events"]
            curves = {name: [value for _, _, value in points] for name, points in found.items()}
            needed = CURVES[chart["title"]].items()
            assert curves == {f"grad_norm/{name}": values for name, values in needed}
        for run, tag, needed in (
            ("a", "grad_norm/settings", ["SGD", "Fixed(2.0)", "skip", "gradclip"]),
            ("b", "grad_norm/settings", ["SGD", "Fixed(3.0)", "skip", "gradclip"]),
            ("b", "grad_norm_2/settings", ["SGD", "Fixed(None)", "scale", "gradclip"]),
        ):
            [text] = server.ask("data/plugin/text/text", run=run, tag=tag)
            assert "<table>" in text["text"]
            assert all(word in text["text"] for word in needed)
