"""Logs of both formats: frames of records, and runs as arrays with their norms of parameters."""

import math
import random
import tracemalloc

import numpy as np
import pytest
from tensorboard.compat.proto.event_pb2 import Event

from gradclip import ArgumentError, GradientClipper, JsonlSink, MemorySink, TensorBoardSink
from gradclip.records.sinks import tfrecord
from gradclip.report import Run, read_runs
from gradclip.report.run import run_of
from gradclip.report.summary import summarized
from tests.support.curves import framed, header_of
from tests.support.report import log_line
from tests.support.trainings import BATCHES, loader, loss_of, momentum, net_of

NAN = math.nan
LENGTHS = [0, 1, 2, 7, 8, 63, 200, 1000, 1023, 1024, 1025, 1028, 2048, 3000]
SOURCE = random.Random(0)
MANY = [[], *([length] for length in LENGTHS), SOURCE.choices(LENGTHS, k=60)]


@pytest.mark.parametrize("lengths", MANY, ids=lambda lengths: f"{len(lengths)} of {lengths[:1]}")
def test_records_are_framed_as_by_tensorboards_writer(lengths):
    """Including the checksums."""
    contents = [SOURCE.randbytes(length) for length in lengths]
    assert tfrecord.framed(contents) == framed(contents)
    assert [*map(tfrecord.header_of, lengths)] == [*map(header_of, lengths)]


FIELDS = ("parameter_norms", "weight_norms", "update_ratios")


def entries_of_run(run, field="parameter_norms"):
    """Return the numbers of parameters by step and name."""
    logged = getattr(run, field)
    names = [logged.names[index] for index in logged.name_indices]
    return dict(zip(zip(logged.steps.tolist(), names, strict=True), logged.norms, strict=True))


def read_lines(path, *steps):
    """Write a line for each step and its norms of parameters, or None; read the run."""
    fields = [{} if norms is None else {"parameter_norms": norms} for _, norms in steps]
    lines = [log_line(step, 2.0, **more) for (step, _), more in zip(steps, fields, strict=True)]
    path.write_text("\n".join(lines))
    [run] = read_runs([path])
    return run


def read_events(path, *events):
    """Write an event for each step and its numbers by tag; read the runs."""
    contents = []
    for step, numbers in events:
        values = [{"tag": tag, "simple_value": value} for tag, value in numbers.items()]
        contents.append(Event(step=step, summary={"value": values}).SerializeToString())
    path.mkdir()
    (path / "events.out.tfevents.1.x").write_bytes(framed(contents))
    return read_runs([path])


def test_every_sink_writes_the_same_run(tmp_path):
    net, wanted = net_of(), {"per_parameter": "all", "per_parameter_every": 2, "weights_every": 3}
    optimizer, memory = momentum(net), MemorySink(**wanted)
    others = JsonlSink(tmp_path / "a.jsonl", **wanted), TensorBoardSink(tmp_path / "a", **wanted)
    with GradientClipper(optimizer, 0.5, nonfinite="skip", model=net, log=[memory, *others]):
        for step, batch in enumerate(loader()):
            optimizer.zero_grad()
            (loss_of(net, batch) * (NAN if step == 3 else 1)).backward()
            optimizer.step()
    first, *others = run_of(memory.steps, "memory"), *read_runs([tmp_path])
    assert first.steps.tolist() == [*range(BATCHES)]
    assert first.skipped.tolist() == (~first.finite).tolist() == [n == 3 for n in range(BATCHES)]
    assert first.thresholds.tolist() == [0.5] * BATCHES
    assert {*first.parameter_norms.steps.tolist()} == {0, 2, 3, 4, 6}  # 3: not finite
    entries, names = entries_of_run(first), dict(net.named_parameters())
    assert math.hypot(*(entries[2, name] for name in names)) == pytest.approx(first.norms[2])
    for field in FIELDS[1:]:
        assert {*getattr(first, field).steps.tolist()} == {0, 3, 6}
        assert {*getattr(first, field).names} == {*names}
    assert len(others) == 2
    for run in others:
        for field in ("steps", "skipped", "thresholds"):
            assert getattr(run, field).tolist() == getattr(first, field).tolist()
        for field in ("norms", "clipped_norms"):
            found, expected = getattr(run, field), getattr(first, field)
            assert found[first.finite] == pytest.approx(expected[first.finite], rel=1e-6)
        for field in FIELDS:
            entries = entries_of_run(first, field)
            assert entries_of_run(run, field) == pytest.approx(entries, rel=1e-6, nan_ok=True)


def test_lines_name_any_parameters_at_any_steps(tmp_path):
    lines = [(0, {"b": 1.5, "a": None}), (1, None), (2, {"c": 3, "a": 1e300}), (3, {})]
    run = read_lines(tmp_path / "a.jsonl", *lines)
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert run.parameter_norms.names == ("b", "a", "c")
    expected = {(0, "b"): 1.5, (0, "a"): NAN, (2, "c"): 3.0, (2, "a"): 1e300}
    assert entries_of_run(run) == pytest.approx(expected, nan_ok=True)
    assert read_lines(tmp_path / "a.jsonl", (0, None), (1, {})).parameter_norms is None
    with pytest.raises(ArgumentError, match="No runs were given"):
        read_runs([])


def test_events_belong_to_the_clipper_in_their_tags(tmp_path):
    first, second, third = read_events(
        tmp_path / "run",
        (0, {"grad_norm/pre": 1.0, "parameter_norm/a/b": 0.5, "parameter_norm/x\ny": math.inf}),
        (0, {"grad_norm_2/pre": 7.0, "parameter_norm_2/a/b": 6.0}),
        (0, {"grad_norm_3/pre": 7.0}),
        (1, {"grad_norm/pre": 2.0, "parameter_norm_2/a/b": 99.0, "loss": 3.0}),
        (2, {"grad_norm/pre": NAN, "parameter_norm/a/b": NAN, "parameter_norm/": 1.0}),
        (3, {"parameter_norm/a/b": 99.0, "grad_norm/post": 1.0}),
    )
    assert (first.steps.tolist(), second.steps.tolist()) == ([0, 1, 2], [0])
    expected = {(0, "a/b"): 0.5, (0, "x\ny"): math.inf, (2, "a/b"): NAN}
    assert entries_of_run(first) == pytest.approx(expected, nan_ok=True)
    assert entries_of_run(second) == {(0, "a/b"): 6.0}
    assert third.parameter_norms is None


def test_a_resumed_run_replaces_norms_of_parameters_with_their_steps(tmp_path):
    replaced = [(step, {"old": 1.0, "both": 1.0}) for step in range(2, 6)]
    lines = [(0, {"both": 0.0}), (1, None), *replaced, (2, None), (3, {"both": 4})]
    run = read_lines(tmp_path / "a.jsonl", *lines)
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert entries_of_run(run) == {(0, "both"): 0.0, (3, "both"): 4.0}
    assert run.parameter_norms.names == ("both",)
    assert read_lines(tmp_path / "a.jsonl", (0, {"old": 1.0}), (0, None)).parameter_norms is None
    events = [(n, {"grad_norm/pre": 1.0, "parameter_norm/a": float(n)}) for n in (0, 1, 2, 1)]
    [run] = read_events(tmp_path / "run", *events)
    assert entries_of_run(run) == {(0, "a"): 0.0, (1, "a"): 1.0}


def test_norms_of_parameters_stay_with_their_steps_in_long_runs(tmp_path):
    """More steps than are parsed, and packed, at once; a foreign line shifts nothing."""
    expected = {(step, "a"): float(step) for step in range(0, 20_000, 7)}
    norms = [{"a": float(n)} if n % 7 == 0 else None for n in range(20_000)]
    run = read_lines(tmp_path / "a.jsonl", *enumerate(norms))
    assert run.steps.tolist() == [*range(20_000)]
    assert entries_of_run(run) == expected
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:9_000], "foreign", *lines[9_000:]]))
    with pytest.warns(UserWarning, match="1 of its lines are not steps"):
        assert entries_of_run(read_runs([tmp_path / "b.jsonl"])[0]) == expected
    tags = [{f"parameter_norm/{name}": norm for name, norm in (n or {}).items()} for n in norms]
    [run] = read_events(tmp_path / "run", *enumerate({"grad_norm/pre": 1.0, **t} for t in tags))
    assert entries_of_run(run) == expected
    assert len(run) == 20_000


def test_a_million_steps_are_summed_up_in_little_memory():
    norms = np.tile(1 + 0.05 * np.random.default_rng(0).standard_normal(10_000), 100)
    zeros = np.zeros(len(norms))
    run = Run("run", np.arange(len(norms)), norms, norms, zeros * NAN, zeros.astype(bool))
    tracemalloc.start()
    summarized(run)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6


def test_other_scalars_of_a_directory_belong_to_its_runs(tmp_path):
    """Those of a resumed run replace older ones; a clipper's own curves are none of them."""
    [run] = read_events(
        tmp_path / "run",
        *((step, {"grad_norm/pre": 1.0, "loss": 3.0 - step}) for step in range(3)),
        (1, {"grad_norm/clip_rate": 0.5, "loss": 9.0, "train/lr": 0.1}),
    )
    assert {*run.scalars} == {"loss", "train/lr"}
    assert run.scalars["loss"].steps.tolist() == [0, 1]
    assert run.scalars["loss"].values.tolist() == [3.0, 9.0]


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1300])
def test_a_damaged_record_ends_a_file_of_any_length(tmp_path, length):
    """Checksums are compared for many records at once."""
    contents = [
        Event(step=step, summary={"value": [{"tag": "grad_norm/pre", "simple_value": 1.0}]})
        for step in range(length)
    ]
    records = [framed([content.SerializeToString()]) for content in contents]
    file = tmp_path / "events.out.tfevents.1.x"
    file.write_bytes(b"".join(records))
    assert len(read_runs([file])[0]) == length
    for damaged in {1, length // 2, length - 1} - {0, length}:
        file.write_bytes(b"".join([*records[:damaged], b"?" + records[damaged], *records]))
        with pytest.warns(UserWarning, match="cut short or damaged"):
            assert len(read_runs([file])[0]) == damaged
