"""What every sink of the package does: values, cadence, batches, parameter norms, refusals."""

import math

import pytest

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    TensorBoardSink,
)
from tests.support.curves import Kept, curves_in, lines_in, log_named, log_run, texts_in

STEPS = [(1.0, 2.0, 3.0), (5.0, 4.0, 3.0), (0.0, 1.0, 0.5), (7.0, 8.0, 9.0)]
SPIKE = [*[(1.0, 1.0 + step % 3 / 10, 0.0) for step in range(33)], (1.0, 50.0, 2.0)]


class TensorBoard:
    def __init__(self, path, options):
        self.sink, self._path = TensorBoardSink(path / "run", **options), path / "run"

    def numbers(self):
        steps = {}
        for tag, points in curves_in(self._path).items() if self._path.exists() else ():
            for point in points:
                steps.setdefault(point.step, {})[tag] = point.value
        return steps

    def incidents(self):
        return texts_in(self._path, "grad_norm/incidents")


class Lines:
    def __init__(self, path, options):
        self.sink, self._path = JsonlSink(path / "run.jsonl", **options), path / "run.jsonl"

    def rows(self):
        lines = lines_in(self._path) if self._path.exists() else []
        assert all(line.get("parameter_norms") != {} for line in lines)
        return lines

    def numbers(self):
        return {row["step"]: as_tags(row) for row in self.rows()}

    def incidents(self):
        return {row["step"]: row["incident"] for row in self.rows() if row.get("incident")}


class Memory(Lines):
    def __init__(self, path, options):
        self.sink = MemorySink(**options)

    def rows(self):
        return [step._asdict() for step in self.sink.steps]


class Logger:
    def __init__(self, path, options):
        self._numbers = {}
        self.sink = CallableSink(self._log, **options)

    def _log(self, numbers, step):
        self._numbers[step] = numbers

    def numbers(self):
        return self._numbers

    def incidents(self):
        return None  # there are numbers alone


TAGS = {"pre": "norm", "post": "clipped_norm", "clip_rate": "clip_rate"}


def as_tags(row):
    norms = row.get("parameter_norms") or {}
    numbers = {f"grad_norm/{tag}": row[field] for tag, field in TAGS.items()}
    return numbers | {f"parameter_norm/{name}": norm for name, norm in norms.items()}


@pytest.fixture(params=[TensorBoard, Lines, Memory, Logger])
def make_log(request, tmp_path):
    """Make a log with some options of its sink."""
    return lambda **options: request.param(tmp_path, options)


def values_by_step(log, tag):
    """Return the values under a tag by step."""
    return {step: numbers[f"grad_norm/{tag}"] for step, numbers in log.numbers().items()}


def parameter_norms(log):
    """Return the parameter norms of each step that has some."""
    prefix, found = "parameter_norm/", {}
    for step, numbers in log.numbers().items():
        for name, norm in numbers.items():
            if name.startswith(prefix):
                found.setdefault(step, {})[name.removeprefix(prefix)] = norm
    return found


def test_norms_before_and_after(make_log):
    """JSON has no number for norms that are not finite: there they are null."""
    made = make_log()
    log_run(made.sink, 4.0, math.nan, math.inf, 1.0, first=100)
    before = values_by_step(made, "pre")
    assert [*before] == [100, 101, 102, 103]
    if type(made) is Lines:
        assert [*before.values()] == [4.0, None, None, 1.0]
    else:
        assert [*before.values()] == pytest.approx([4.0, math.nan, math.inf, 1.0], nan_ok=True)
    assert [*values_by_step(made, "post").values()] == [2.0, 0.0, 0.0, 1.0]


def test_every_and_flush_every(make_log, training):
    """Steps whose index is a multiple, with the counts of all, in batches and at flush."""
    made, run = make_log(every=3, flush_every=2), training()
    with GradientClipper(run.optimizer, 2.0, log=made.sink) as clipper:
        assert (made.sink.every, made.sink.flush_every) == (3, 2)
        clipper.steps = 7
        run.take(3.0, 1.0, 3.0, 3.0, 1.0)
        assert [*made.numbers()] == [9]
        run.take(*[1.0] * 4)
        assert [*made.numbers()] == [9, 12]
        clipper.flush()
        assert values_by_step(made, "clip_rate") == pytest.approx({9: 2 / 3, 12: 1 / 2, 15: 1 / 3})


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, {}),
        (
            {"per_parameter": "all"},
            {step: dict(zip("abc", norms, strict=True)) for step, norms in enumerate(STEPS)},
        ),
        (
            {"per_parameter": 2},
            [
                {"c": 3.0, "b": 2.0},
                {"a": 5.0, "b": 4.0},
                {"b": 1.0, "c": 0.5},
                {"c": 9.0, "b": 8.0},
            ],
        ),
        ({"per_parameter": 1, "per_parameter_every": 3}, {0: {"c": 3.0}, 3: {"c": 9.0}}),
    ],
    ids=["none", "all", "the largest", "a cadence of their own"],
)
def test_parameter_norms_before_clipping(make_log, options, needed):
    made = make_log(**options)
    log_named(made.sink, "abc", *STEPS)
    assert parameter_norms(made) == (
        dict(enumerate(needed)) if isinstance(needed, list) else needed
    )


def test_incidents_at_any_cadence(make_log):
    """A text in TensorBoard; a step of its own in files and memory."""
    made = make_log(every=100)
    log_named(made.sink, "abc", *SPIKE)
    if (incidents := made.incidents()) is not None:
        assert [*incidents] == [33]
        assert "most of it in b (50)" in incidents[33]
    assert [*made.numbers()] == ([0, 33] if isinstance(made, Lines) else [0])


def test_parameter_norms_of_incidents_at_any_cadence(make_log):
    made = make_log(per_parameter=1, per_parameter_every=100)
    log_named(made.sink, "abc", *SPIKE, (1.0, 3.0, math.inf))
    found = parameter_norms(made)
    assert found.pop(34) in ({"c": math.inf}, {"c": None})
    assert found == {0: {"a": 1.0}, 33: {"b": 50.0}}


COUNTS = {"every": 1, "flush_every": 1, "per_parameter_every": 1, "per_parameter": 0}


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        *[
            (name, value, f"give a whole number >= {least} and < 2**62.")
            for name, least in COUNTS.items()
            for value in (least - 1, -1, 1.5, True, None)
        ],
        *[(name, "10", "give a whole number >= 1 and < 2**62.") for name in [*COUNTS][:3]],
        ("per_parameter", "many", 'give how many parameters, or "all".'),
    ],
)
def test_invalid_numbers_are_refused(make_log, name, value, needed):
    with pytest.raises(ArgumentError) as caught:
        make_log(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}: {needed}"


def test_only_sinks_that_ask_get_parameter_norms():
    """Plain steps can be hashed."""
    plain, asking = Kept(), Kept(per_parameter=1)
    log_named([plain, asking], "abc", (None, None, None), *STEPS)
    assert {*plain.steps} == {step._replace(parameter_norms=None) for step in asking.steps}
    first, second, *_ = [dict(step.parameter_norms or {}) for step in asking.steps]
    assert (first, second) == ({}, {"a": 1.0, "b": 2.0, "c": 3.0})
