"""What every sink of the package does: values, cadence, batches, parameter norms, refusals."""

import math
from collections import defaultdict

import pytest
import torch

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    TensorBoardSink,
)
from tests.support.curves import Kept, curves_in, lines_in, log_named, log_run, texts_in
from tests.support.reference import parameter_with

STEPS = [(1.0, 2.0, 3.0), (5.0, 4.0, 3.0), (0.0, 1.0, 0.5), (7.0, 8.0, 9.0)]
SPIKE = [*[(1.0, 1.0 + step % 3 / 10, 0.0) for step in range(33)], (1.0, 50.0, 2.0)]


TAGS = {"pre": "norm", "post": "clipped_norm", "clip_rate": "clip_rate"}
OF_PARAMETER = "parameter_norm/"
FIELDS = {OF_PARAMETER: "parameter_norms", "weight_norm/": "weight_norms"}
FIELDS["update_ratio/"] = "update_ratios"


def as_tags(row):
    numbers = {f"grad_norm/{tag}": row[field] for tag, field in TAGS.items()}
    for start, field in FIELDS.items():
        numbers |= {f"{start}{name}": number for name, number in (row.get(field) or {}).items()}
    return numbers


class Log:
    """A sink, and the numbers and incidents by step that it has written."""

    def __init__(self, kind, path, options):
        self.kind, self._path, self._logged = kind, path, defaultdict(dict)
        where = {CallableSink: [self._log], MemorySink: []}.get(kind, [path])
        self.sink = kind(*where, **options)

    def _log(self, numbers, step):
        self._logged[step].update(numbers)

    def rows(self):
        if self.kind is MemorySink:
            return [step._asdict() for step in self.sink.steps]
        lines = lines_in(self._path) if self._path.exists() else []
        assert all(line.get("parameter_norms") != {} for line in lines)
        return lines

    def numbers(self):
        if self.kind in (JsonlSink, MemorySink):
            return {row["step"]: as_tags(row) for row in self.rows()}
        for tag, points in curves_in(self._path).items() if self._path.exists() else ():
            for point in points:
                self._log({tag: point.value}, point.step)
        return self._logged

    def values(self, tag):
        return {step: numbers[f"grad_norm/{tag}"] for step, numbers in self.numbers().items()}

    def parameter_norms(self, start=OF_PARAMETER):
        """Return the numbers of parameters of each step that was written."""
        return [
            {tag.removeprefix(start): n for tag, n in numbers.items() if tag.startswith(start)}
            for numbers in self.numbers().values()
        ]

    def incidents(self):
        if self.kind is TensorBoardSink:
            return texts_in(self._path, "grad_norm/incidents")
        return {row["step"]: row["incident"] for row in self.rows() if row.get("incident")}


@pytest.fixture(params=[TensorBoardSink, JsonlSink, MemorySink, CallableSink])
def make_log(request, tmp_path):
    """Make a log with some options of its sink."""
    return lambda **options: Log(request.param, tmp_path / "run", options)


def test_norms_before_and_after(make_log):
    """JSON has no number for norms that are not finite: there they are null."""
    made = make_log()
    log_run(made.sink, 4.0, math.nan, math.inf, 1.0, first=100)
    before = made.values("pre")
    assert [*before] == [100, 101, 102, 103]
    if made.kind is JsonlSink:
        assert [*before.values()] == [4.0, None, None, 1.0]
    else:
        assert [*before.values()] == pytest.approx([4.0, math.nan, math.inf, 1.0], nan_ok=True)
    assert [*made.values("post").values()] == [2.0, 0.0, 0.0, 1.0]


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
        assert made.values("clip_rate") == pytest.approx({9: 2 / 3, 12: 1 / 2, 15: 1 / 3})


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, [{}] * 4),
        ({"per_parameter": "all"}, [dict(zip("abc", norms, strict=True)) for norms in STEPS]),
        (
            {"per_parameter": 2},
            [{"c": 3, "b": 2}, {"a": 5, "b": 4}, {"b": 1, "c": 0.5}, {"c": 9, "b": 8}],
        ),
        ({"per_parameter": 1, "per_parameter_every": 3}, [{"c": 3}, {}, {}, {"c": 9}]),
    ],
    ids=["none", "all", "the largest", "a cadence of their own"],
)
def test_parameter_norms_before_clipping(make_log, options, needed):
    made = make_log(**options)
    log_named(made.sink, "abc", *STEPS)
    assert made.parameter_norms() == needed


def test_norms_of_weights_and_ratios_of_updates(make_log):
    """A step that has them is written at any cadence; a parameter of zeros has no ratio."""
    made, weights = make_log(every=5, weights_every=2), [torch.tensor([3.0, 4.0]), torch.zeros(1)]
    named = [*zip("ab", map(parameter_with, weights), strict=True)]
    optimizer = torch.optim.SGD(named, lr=1.0)
    for _, parameter in named:
        torch.nn.init.constant_(parameter, 5.0 if parameter.numel() == 2 else 0.0)
    with GradientClipper(optimizer, None, log=made.sink):
        for _ in range(3):
            optimizer.step()
    assert [*made.numbers()] == [0, 2]
    first, second = made.parameter_norms("weight_norm/")
    assert first == pytest.approx({"a": math.hypot(5, 5), "b": 0.0})
    assert second == pytest.approx({"a": math.hypot(1, 3), "b": 0.0})
    first, second = made.parameter_norms("update_ratio/")
    assert first == pytest.approx({"a": 5 / math.hypot(5, 5)})
    assert second == pytest.approx({"a": 5 / math.hypot(1, 3)})


def test_incidents_at_any_cadence(make_log):
    """A text in TensorBoard, a step of its own in files and memory; functions get numbers alone."""
    made = make_log(every=100)
    log_named(made.sink, "abc", *SPIKE)
    if made.kind is not CallableSink:
        assert [*made.incidents()] == [33]
        assert "most of it in b (50)" in made.incidents()[33]
    assert [*made.numbers()] == ([0, 33] if made.kind in (JsonlSink, MemorySink) else [0])


def test_parameter_norms_of_incidents_at_any_cadence(make_log):
    made = make_log(per_parameter=1, per_parameter_every=100)
    log_named(made.sink, "abc", *SPIKE, (1.0, 3.0, math.inf))
    *norms, last = made.parameter_norms()
    assert last in ({"c": math.inf}, {"c": None})
    assert norms == [{"a": 1.0}, *[{}] * 32, {"b": 50.0}]


COUNTS = {"every": 1, "flush_every": 1, "per_parameter_every": 1}
COUNTS |= {"per_parameter": 0, "weights_every": 0}


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
