"""Norms of single parameters, read back."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from gradclip import GradientClipper, JsonlSink, MemorySink, TensorBoardSink
from gradclip.records.sinks.tfrecord import framed
from gradclip.report import read_runs
from gradclip.report.run import run_of

NAN = math.nan


def entries(run):
    """Return the norms of parameters by step and name."""
    found = run.parameter_norms
    assert found.steps.dtype == np.int64
    assert len(found.steps) == len(found.name_indices) == len(found.norms)
    return {
        (int(step), found.names[place]): float(norm)
        for step, place, norm in zip(found.steps, found.name_indices, found.norms, strict=True)
    }


def line(step, parameter_norms=None, **more):
    fields = {"step": step, "norm": 2.0, "clipped_norm": 1.0, "threshold": 1.0, "skipped": False}
    if parameter_norms is not None:
        fields["parameter_norms"] = parameter_norms
    return json.dumps({**fields, **more})


def write_lines(path, *lines):
    path.write_text("".join(f"{each}\n" for each in lines))
    [run] = read_runs([path])
    return run


def write_events(path, *events):
    """Write events: of each the step, and the numbers by tag."""
    path.mkdir()
    content = b""
    for step, numbers in events:
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]
        content += framed([Event(step=step, summary=Summary(value=values)).SerializeToString()])
    (path / "events.out.tfevents.1.x").write_bytes(content)
    return read_runs([path])


def test_lines_have_them_in_some_steps_and_of_some_parameters(tmp_path):
    run = write_lines(
        tmp_path / "a.jsonl",
        line(0, {"b": 1.5, "a": None}),
        line(1),
        line(2, {"c": 3, "a": 1e300}, incident="It spiked."),
        line(3, {}),
    )
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.parameter_norms.names == ("b", "a", "c")
    expected = {(0, "b"): 1.5, (0, "a"): NAN, (2, "c"): 3.0, (2, "a"): 1e300}
    assert entries(run) == pytest.approx(expected, nan_ok=True)


def test_events_have_them_beside_the_norms_of_their_clipper(tmp_path):
    first, second = write_events(
        tmp_path / "run",
        (0, {"grad_norm/pre": 1.0, "parameter_norm/a/b": 0.5, "parameter_norm/x\ny": math.inf}),
        (0, {"grad_norm_2/pre": 7.0, "parameter_norm_2/a/b": 6.0}),
        (1, {"grad_norm/pre": 2.0, "parameter_norm_2/a/b": 99.0, "loss": 3.0}),
        (2, {"grad_norm/pre": NAN, "parameter_norm/a/b": NAN, "parameter_norm/": 1.0}),
        (3, {"parameter_norm/a/b": 99.0}),
    )
    assert (first.steps.tolist(), second.steps.tolist()) == ([0, 1, 2], [0])
    expected = {(0, "a/b"): 0.5, (0, "x\ny"): math.inf, (2, "a/b"): NAN}
    assert entries(first) == pytest.approx(expected, nan_ok=True)
    assert entries(second) == {(0, "a/b"): 6.0}
    assert second.name.endswith(" (grad_norm_2)")


def test_a_run_without_them_has_none(tmp_path):
    assert write_lines(tmp_path / "a.jsonl", line(0), line(1)).parameter_norms is None
    assert write_lines(tmp_path / "a.jsonl", line(0, {})).parameter_norms is None
    [run] = write_events(tmp_path / "run", (0, {"grad_norm/pre": 1.0}))
    assert run.parameter_norms is None


def test_what_a_resumed_run_takes_back_goes_with_its_steps(tmp_path):
    lines = [line(step, {"old": 1.0, "both": 1.0}) for step in range(2, 6)]
    run = write_lines(
        tmp_path / "a.jsonl", line(0, {"both": 0.0}), line(1), *lines, line(2), line(3, {"both": 4})
    )
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert entries(run) == {(0, "both"): 0.0, (3, "both"): 4.0}
    assert run.parameter_norms.names == ("both",)
    run = write_lines(tmp_path / "a.jsonl", line(0, {"old": 1.0}), line(0))
    assert run.parameter_norms is None
    [run] = write_events(
        tmp_path / "run",
        *[(step, {"grad_norm/pre": 1.0, "parameter_norm/a": float(step)}) for step in range(5)],
        (3, {"grad_norm/pre": 1.0, "parameter_norm/a": 30.0}),
    )
    assert entries(run) == {(0, "a"): 0.0, (1, "a"): 1.0, (2, "a"): 2.0, (3, "a"): 30.0}


@pytest.mark.parametrize("wrong", [[1.0], "text", 3.0, {"a": [1.0]}, {"a": "text"}, {"a": {}}])
def test_a_line_whose_norms_are_none_is_passed_over_whole(tmp_path, wrong):
    with pytest.warns(UserWarning, match="1 of its lines are not steps and were ignored"):
        run = write_lines(
            tmp_path / "a.jsonl", line(0, {"a": 1.0}), line(1, wrong), line(2, {"a": 3.0})
        )
    assert run.steps.tolist() == [0, 2]
    assert entries(run) == {(0, "a"): 1.0, (2, "a"): 3.0}


def test_numbers_that_are_too_long_are_passed_over_as_well(tmp_path):
    with pytest.warns(UserWarning, match="2 of its lines are not steps"):
        run = write_lines(
            tmp_path / "a.jsonl", line(0), line(1, {"a": 10**400}), line(2, norm=10**400)
        )
    assert run.steps.tolist() == [0]


def test_they_belong_to_their_steps_however_many_there_are(tmp_path):
    """More than are parsed, and packed, at once."""
    count = 20_000
    norms = {step: {"a": float(step)} if step % 7 == 0 else None for step in range(count)}
    expected = {(step, "a"): float(step) for step in range(0, count, 7)}
    lines = [line(step, each) for step, each in norms.items()]
    lines[14_000] = "foreign"
    expected.pop((14_000, "a"), None)
    with pytest.warns(UserWarning, match="1 of its lines"):
        assert entries(write_lines(tmp_path / "a.jsonl", *lines)) == expected
    events = [
        (step, {"grad_norm/pre": 1.0, **({"parameter_norm/a": each["a"]} if each else {})})
        for step, each in norms.items()
    ]
    [run] = write_events(tmp_path / "run", *events)
    assert entries(run) == {(step, "a"): float(step) for step in range(0, count, 7)}


def test_what_the_sinks_write_is_read_back(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = {"per_parameter": "all", "per_parameter_every": 2}
    memory = MemorySink(**wanted)
    log = [
        memory,
        JsonlSink(tmp_path / "a.jsonl", **wanted),
        TensorBoardSink(tmp_path / "a", **wanted),
    ]
    with GradientClipper(optimizer, 0.5, model=model, log=log):
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
    runs = [run_of(memory.steps, "memory"), *read_runs([tmp_path])]
    assert len(runs) == 3
    for run in runs:
        assert {*run.parameter_norms.names} == {"weight", "bias"}
        assert sorted({*run.parameter_norms.steps.tolist()}) == [0, 2, 4]
        assert entries(run) == pytest.approx(entries(runs[0]), rel=1e-6)
        for step in (0, 2, 4):
            both = [entries(run)[step, name] for name in ("weight", "bias")]
            assert math.hypot(*both) == pytest.approx(run.norms[step], rel=1e-5)
