"""What every sink of the package does: values, cadence, batches, parameter norms, refusals."""

import math

import pytest
import torch
from torch import nn

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    Sink,
    TensorBoardSink,
)
from tests.support.curves import curves_in, lines_in, log_run, texts_in

NAMES = ("a", "b.weight", "c")
STEPS = [(1.0, 2.0, 3.0), (5.0, 4.0, 3.0), (0.0, 1.0, 0.5), (7.0, 8.0, 9.0)]
SPIKE = [*[(1.0, 1.0 + step % 3 / 10, 0.0) for step in range(33)], (1.0, 50.0, 2.0)]


class NamedTraining:
    """Three parameters, whose gradients at each step are those that are given."""

    def __init__(self, *sinks):
        self.parameters = {name: nn.Parameter(torch.zeros(1)) for name in NAMES}
        self.optimizer = torch.optim.SGD([*self.parameters.items()], lr=0.0)
        self.clipper = GradientClipper(self.optimizer, 1.0, log=[*sinks])

    def take(self, *steps):
        for norms in steps:
            for parameter, norm in zip(self.parameters.values(), norms, strict=True):
                parameter.grad = torch.full((1,), norm)
            self.optimizer.step()
        return self


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

    def numbers(self):
        lines = lines_in(self._path) if self._path.exists() else []
        assert all(line.get("parameter_norms") != {} for line in lines)
        return {line["step"]: as_tags(line) for line in lines}

    def incidents(self):
        return {
            line["step"]: line["incident"] for line in lines_in(self._path) if "incident" in line
        }


class Memory:
    def __init__(self, path, options):
        self.sink = MemorySink(**options)

    def numbers(self):
        return {step.step: as_tags(step._asdict()) for step in self.sink.steps}

    def incidents(self):
        return {step.step: step.incident for step in self.sink.steps if step.incident}


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


def as_tags(fields):
    norms = fields.get("parameter_norms") or {}
    numbers = {"grad_norm/pre": fields["norm"], "grad_norm/post": fields["clipped_norm"]}
    return numbers | {f"parameter_norm/{name}": norm for name, norm in norms.items()}


@pytest.fixture(params=[TensorBoard, Lines, Memory, Logger])
def make_log(request, tmp_path):
    """Make a log with some options of its sink."""
    return lambda **options: request.param(tmp_path, options)


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
    found = made.numbers()
    assert [*found] == [100, 101, 102, 103]
    before = [numbers["grad_norm/pre"] for numbers in found.values()]
    if isinstance(made, Lines):
        assert before == [4.0, None, None, 1.0]
    else:
        assert before == pytest.approx([4.0, math.nan, math.inf, 1.0], nan_ok=True)
    assert [numbers["grad_norm/post"] for numbers in found.values()] == [2.0, 0.0, 0.0, 1.0]


def test_every_and_flush_every(make_log, training):
    made, run = make_log(every=3, flush_every=2), training()
    with GradientClipper(run.optimizer, None, log=made.sink) as clipper:
        assert (made.sink.every, made.sink.flush_every) == (3, 2)
        run.take(*[1.0] * 5)
        assert [*made.numbers()] == [0, 3]
        run.take(1.0, 1.0)
        assert [*made.numbers()] == [0, 3]
        clipper.flush()
        assert [*made.numbers()] == [0, 3, 6]


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, {}),
        (
            {"per_parameter": "all"},
            {step: dict(zip(NAMES, norms, strict=True)) for step, norms in enumerate(STEPS)},
        ),
        (
            {"per_parameter": 2},
            {
                0: {"c": 3.0, "b.weight": 2.0},
                1: {"a": 5.0, "b.weight": 4.0},
                2: {"b.weight": 1.0, "c": 0.5},
                3: {"c": 9.0, "b.weight": 8.0},
            },
        ),
        ({"per_parameter": 1, "per_parameter_every": 3}, {0: {"c": 3.0}, 3: {"c": 9.0}}),
    ],
    ids=["none", "all", "the largest", "a cadence of their own"],
)
def test_parameter_norms_before_clipping(make_log, options, needed):
    made = make_log(**options)
    NamedTraining(made.sink).take(*STEPS).clipper.close()
    assert parameter_norms(made) == needed


def test_incidents_at_any_cadence(make_log):
    """A text in TensorBoard; a step of its own in files and memory."""
    made = make_log(every=100)
    NamedTraining(made.sink).take(*SPIKE).clipper.close()
    if (incidents := made.incidents()) is not None:
        assert [*incidents] == [33]
        assert "most of it in b.weight (50)" in incidents[33]
    assert [*made.numbers()] == ([0, 33] if isinstance(made, Lines | Memory) else [0])


def test_parameter_norms_of_incidents_at_any_cadence(make_log):
    made = make_log(per_parameter=1, per_parameter_every=100)
    NamedTraining(made.sink).take(*SPIKE, (1.0, 3.0, math.inf)).clipper.close()
    found = parameter_norms(made)
    assert found.pop(34) in ({"c": math.inf}, {"c": None})
    assert found == {0: {"a": 1.0}, 33: {"b.weight": 50.0}}


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        *[
            (name, value, "give a whole number >= 1 and < 2**62.")
            for name in ("every", "flush_every", "per_parameter_every")
            for value in (0, -1, 1.5, "10", True, None)
        ],
        *[
            ("per_parameter", value, "give a whole number >= 0 and < 2**62.")
            for value in (-1, 1.5, True, None)
        ],
        ("per_parameter", "many", 'give how many parameters, or "all".'),
    ],
)
def test_invalid_numbers_are_refused(make_log, name, value, needed):
    with pytest.raises(ArgumentError) as caught:
        make_log(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}: {needed}"


def test_only_sinks_that_ask_get_parameter_norms():
    class Plain(Sink):
        def __init__(self):
            self.steps = []

        def write(self, steps):
            assert len({*steps}) == len(steps)  # plain steps can be hashed
            self.steps += steps

    class Asking(Plain):
        per_parameter = 1

        def write(self, steps):
            self.steps += [{**(step.parameter_norms or {})} for step in steps]

    plain, asking = Plain(), Asking()
    training = NamedTraining(plain, asking)
    training.optimizer.step()  # no parameter has a gradient
    training.take(*STEPS).clipper.close()
    assert [step.parameter_norms for step in plain.steps] == [None] * 5
    assert asking.steps[:2] == [{}, {"a": 1.0, "b.weight": 2.0, "c": 3.0}]
