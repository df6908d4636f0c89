"""A training that is killed at any moment leaves logs and a state from which it goes on."""

from __future__ import annotations

import itertools
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from gradclip import LoggedStep, MemorySink
from gradclip.report import Run, read_runs
from tests.faults.lives import FLUSH_EVERY, Life, live, said
from tests.support.curves import curves_in

KILLS = 20
LONGEST = 100
"""Steps that a life may take."""
PAUSE = 0.003
"""Seconds that may pass then: some steps, a batch that is written, or a state that is saved."""
ENDLESS = 10**9


class Uninterrupted:
    """The same training, which nobody kills."""

    def __init__(self) -> None:
        self._sink = MemorySink(flush_every=1)
        self._life = Life(self._sink)

    def steps(self, count: int) -> list[LoggedStep]:
        while len(self._sink.steps) < count:
            self._life.step()
        return self._sink.steps[:count]


def logged(path: Path) -> Run | None:
    """Return what `gradclip report` reads; only what is half written may be passed over."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(cut short|1 of its lines)", UserWarning)
        [run] = read_runs([path])
    return run


def check_run(run: Run | None, expected: list[LoggedStep], rel: float) -> int:
    """Check that a run is as it would have been without an end, and return its length."""
    if run is None:
        return 0
    wanted = expected[: len(run)]
    assert run.steps.tolist() == [step.step for step in wanted]
    for found, name in (
        (run.norms, "norm"),
        (run.clipped_norms, "clipped_norm"),
        (run.thresholds, "threshold"),
        (run.skipped, "skipped"),
    ):
        needed = [getattr(step, name) for step in wanted]
        assert found.tolist() == pytest.approx(needed, rel=rel, abs=0, nan_ok=True), name
    return len(run)


def kill(children: Any, folder: Path, until: int, pause: float) -> int:
    """Let a life begin, kill it some time after a step, and return how many steps it said it took.

    A step that lies before the state from which it goes on lets it hardly begin.
    """
    with said(folder) as number:
        number[0] = -1
        process = children.begin(live, folder, ENDLESS)
        ends = time.monotonic() + 60
        while number[0] < max(until, 0) and process.is_alive() and time.monotonic() < ends:
            time.sleep(0.0005)
        time.sleep(pause)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        return number[0]


def test_a_training_that_is_killed_loses_a_batch_at_most_and_goes_on(tmp_path, children):
    moments = random.Random(0)
    whole = Uninterrupted()
    state, lengths, resumed = tmp_path / "state.pt", {"events": 0, "steps.jsonl": 0}, []
    for _ in range(KILLS):
        until = max(resumed, default=0) + moments.randrange(-10, LONGEST)
        taken = kill(children, tmp_path, until, moments.uniform(0, PAUSE))
        for name, before in lengths.items():
            expected = whole.steps(max(before, taken + 1))
            rel = 1e-6 if name == "events" else 0.0
            length = check_run(logged(tmp_path / name), expected, rel)
            assert taken - FLUSH_EVERY < length
            assert length == before or length <= taken + 1
            assert before - FLUSH_EVERY < length
            lengths[name] = length
        if lengths["events"]:
            seen = [point.step for point in curves_in(tmp_path / "events")["grad_norm/pre"]]
            assert seen == [*range(lengths["events"])]
        if state.exists():
            steps = torch.load(state, weights_only=True)["clipper"]["steps"]
            assert steps <= min(lengths.values())
            resumed.append(steps)
    assert resumed == sorted(resumed)
    assert len({*resumed}) > KILLS / 2, "most lives save a state"

    last = max(lengths.values()) + 100
    children.run(live, tmp_path, last)
    expected = whole.steps(last)
    for name, rel in (("events", 1e-6), ("steps.jsonl", 0.0)):
        assert check_run(logged(tmp_path / name), expected, rel) == last
    curves = curves_in(tmp_path / "events")
    for tag in ("clip_rate", "nonfinite_steps", "skipped_steps"):
        points = curves[f"grad_norm/{tag}"]
        assert [point.step for point in points] == [*range(last)]
        wanted = [getattr(step, tag) for step in expected]
        assert [point.value for point in points] == pytest.approx(wanted, rel=1e-6)
    assert all(one.wall_time <= two.wall_time for one, two in itertools.pairwise(points))
