"""A training that is killed at any moment leaves logs and a state from which it goes on."""

import itertools
import random
import signal
import time
import warnings

import pytest
import torch

from gradclip import MemorySink
from tests.faults.lives import FLUSH_EVERY, LoggedTraining, live
from tests.support.curves import curves_in, runs_in, steps_in

KILLS = 20
LONGEST = 100
"""Steps that a life may take."""
PAUSE = 0.003
"""Seconds that may pass then: some steps, a batch that is written, or a state that is saved."""
ENDLESS = 10**9
LOGS = {"events": 1e-6, "steps.jsonl": 0.0}
"""The logs, and how much their numbers may differ: event files hold float32."""


def checked_length(path, expected):
    """Return the length of a log, which is as it would have been without an end."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return 0
    with warnings.catch_warnings():  # only half a record or line may be ignored
        warnings.filterwarnings("ignore", "(?s).*(cut short|1 of its lines)", UserWarning)
        [run] = runs_in(path)
    wanted, accuracy = expected[: len(run)], {"rel": LOGS[path.name], "abs": 0, "nan_ok": True}
    assert run.steps.tolist() == [step.step for step in wanted]
    assert run.skipped.tolist() == [step.skipped for step in wanted]
    for field in ("norm", "clipped_norm", "threshold"):
        needed = [getattr(step, field) for step in wanted]
        assert getattr(run, f"{field}s").tolist() == pytest.approx(needed, **accuracy)
    return len(run)


def kill(children, folder, until, pause):
    """Let a life begin, kill it some time after a step, and return how many steps it took.

    A step that lies before the state from which it goes on lets it hardly begin.
    """
    taken = children.context.Value("q", -1, lock=False)
    process = children.begin(live, folder, ENDLESS, taken)
    ends = time.monotonic() + 60
    while taken.value < max(until, 0) and process.is_alive() and time.monotonic() < ends:
        time.sleep(0.0005)
    time.sleep(pause)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    return taken.value


def test_killed_training_loses_a_batch_at_most_and_goes_on(tmp_path, children):
    moments, sink = random.Random(0), MemorySink(flush_every=1)
    alone, expected = LoggedTraining(sink), sink.steps
    state, lengths, resumed = tmp_path / "state.pt", dict.fromkeys(LOGS, 0), []
    for _ in range(KILLS):
        until = max(resumed, default=0) + moments.randrange(-10, LONGEST)
        taken = kill(children, tmp_path, until, moments.uniform(0, PAUSE))
        alone.step_up_to(max(taken + 1, *lengths.values()))
        for name, before in lengths.items():
            length = checked_length(tmp_path / name, expected)
            assert max(taken, before) - FLUSH_EVERY < length
            assert length == before or length <= taken + 1
            lengths[name] = length
        if lengths["events"]:
            assert steps_in(tmp_path / "events")["grad_norm/pre"] == [*range(lengths["events"])]
        if state.exists():
            steps = torch.load(state, weights_only=True)["clipper"]["steps"]
            assert steps <= min(lengths.values())
            resumed.append(steps)
    assert resumed == sorted(resumed)
    assert len({*resumed}) > KILLS / 2, "most lives save a state"

    last = max(lengths.values()) + 100
    children.run(live, tmp_path, last, children.context.Value("q", lock=False))
    alone.step_up_to(last)
    assert [checked_length(tmp_path / name, expected) for name in LOGS] == [last, last]
    curves = curves_in(tmp_path / "events")
    for tag in ("clip_rate", "nonfinite_steps", "skipped_steps"):
        points = curves[f"grad_norm/{tag}"]
        assert [point.step for point in points] == [*range(last)]
        wanted = [getattr(step, tag) for step in expected]
        assert [point.value for point in points] == pytest.approx(wanted, rel=1e-6)
    assert all(one.wall_time <= two.wall_time for one, two in itertools.pairwise(points))
