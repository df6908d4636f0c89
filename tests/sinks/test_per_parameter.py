"""The norms of parameters, and what there is to say of a step, in every sink."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from gradclip import (
    ArgumentError,
    CallableSink,
    GradientClipper,
    JsonlSink,
    MemorySink,
    Sink,
    TensorBoardSink,
)

Norms = dict[int, dict[str, float]]


class Training:
    """Three parameters, whose gradients at each step are those that are given."""

    def __init__(self, sink: Any) -> None:
        self.parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("a", "b.weight", "c")}
        self.optimizer = torch.optim.SGD([*self.parameters.items()], lr=0.0)
        self.clipper = GradientClipper(self.optimizer, 1.0, log=sink)

    def take(self, *steps: tuple[float, float, float]) -> None:
        for norms in steps:
            for parameter, norm in zip(self.parameters.values(), norms, strict=True):
                parameter.grad = torch.full((1,), norm)
            self.optimizer.step()


def of_tensorboard(path: Path, options: dict[str, Any]) -> tuple[Sink, Callable[[], Norms]]:
    def read() -> Norms:
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        found: Norms = {}
        for tag in reader.Tags()["scalars"]:
            prefix, _, name = tag.partition("/")
            for point in reader.Scalars(tag) if prefix == "parameter_norm" else ():
                found.setdefault(point.step, {})[name] = point.value
        return found

    return TensorBoardSink(path, **options), read


def of_jsonl(path: Path, options: dict[str, Any]) -> tuple[Sink, Callable[[], Norms]]:
    def read() -> Norms:
        lines = [json.loads(line) for line in (path / "run.jsonl").read_text().splitlines()]
        assert all(line.get("parameter_norms") != {} for line in lines)
        return {k["step"]: k["parameter_norms"] for k in lines if "parameter_norms" in k}

    return JsonlSink(path / "run.jsonl", **options), read


def of_memory(path: Path, options: dict[str, Any]) -> tuple[Sink, Callable[[], Norms]]:
    sink = MemorySink(**options)
    return sink, lambda: {s.step: {**s.parameter_norms} for s in sink.steps if s.parameter_norms}


def of_callable(path: Path, options: dict[str, Any]) -> tuple[Sink, Callable[[], Norms]]:
    logged: Norms = {}

    def log(numbers: dict[str, float], step: int) -> None:
        own = {
            name.removeprefix("parameter_norm/"): number
            for name, number in numbers.items()
            if not name.startswith("grad_norm/")
        }
        if own:
            logged[step] = own

    return CallableSink(log, **options), lambda: logged


@pytest.fixture(params=[of_tensorboard, of_jsonl, of_memory, of_callable])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Make a sink with some options, and what reads the norms of parameters back."""
    return lambda **options: request.param(tmp_path, options)


STEPS = [(1.0, 2.0, 3.0), (5.0, 4.0, 3.0), (0.0, 1.0, 0.5), (7.0, 8.0, 9.0)]


def test_all_norms_of_every_step_before_clipping(sink):
    log, read = sink(per_parameter="all")
    training = Training(log)
    training.take(*STEPS)
    training.clipper.close()
    assert read() == {
        step: dict(zip(("a", "b.weight", "c"), norms, strict=True))
        for step, norms in enumerate(STEPS)
    }


def test_the_largest_of_the_moment(sink):
    log, read = sink(per_parameter=2)
    training = Training(log)
    training.take(*STEPS)
    training.clipper.close()
    assert read() == {
        0: {"c": 3.0, "b.weight": 2.0},
        1: {"a": 5.0, "b.weight": 4.0},
        2: {"b.weight": 1.0, "c": 0.5},
        3: {"c": 9.0, "b.weight": 8.0},
    }


def test_they_have_a_cadence_of_their_own(sink):
    log, read = sink(per_parameter=1, per_parameter_every=3)
    training = Training(log)
    training.take(*STEPS)
    training.clipper.close()
    assert read() == {0: {"c": 3.0}, 3: {"c": 9.0}}


def test_without_being_asked_for_there_are_none(sink):
    log, read = sink()
    training = Training(log)
    training.take(*STEPS)
    training.clipper.close()
    assert read() == {}


def test_a_step_that_is_not_finite_shows_its_norms_at_any_cadence(sink):
    log, read = sink(per_parameter=2, per_parameter_every=100)
    training = Training(log)
    training.take(*STEPS[:2], (1.0, 3.0, math.inf))
    training.clipper.close()
    found = read()
    assert set(found) == {0, 2}
    assert found[2] in ({"c": math.inf, "b.weight": 3.0}, {"c": None, "b.weight": 3.0})


@pytest.mark.parametrize("number", [-1, 1.5, True, None])
def test_numbers_of_parameters_that_cannot_be_meant_are_refused(sink, number):
    with pytest.raises(ArgumentError, match=r"per_parameter is .*: give a whole number >= 0"):
        sink(per_parameter=number)


def test_other_words_than_all_are_refused(sink):
    with pytest.raises(ArgumentError, match="per_parameter is 'many': give how many parameters"):
        sink(per_parameter="many")
    with pytest.raises(ArgumentError, match="per_parameter_every is 0: give a whole number >= 1"):
        sink(per_parameter_every=0)


# What there is to say


def spiking(training: Training) -> None:
    training.take(*[(1.0, 1.0 + step % 3 / 10, 0.0) for step in range(33)], (1.0, 50.0, 2.0))


def test_in_tensorboard_it_is_a_text_whatever_the_cadence(tmp_path):
    training = Training(TensorBoardSink(tmp_path, every=100))
    spiking(training)
    training.clipper.close()
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    [point] = reader.Tensors("grad_norm/incidents")
    assert point.step == 33
    said = point.tensor_proto.string_val[0].decode()
    assert "most of it in b.weight (50)" in said
    assert [p.step for p in reader.Scalars("grad_norm/pre")] == [0]


def test_in_a_file_and_in_memory_it_is_a_field(tmp_path):
    memory = MemorySink()
    training = Training([JsonlSink(tmp_path / "run.jsonl"), memory])
    spiking(training)
    training.clipper.close()
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line.get("incident") for line in lines] == [step.incident for step in memory.steps]
    assert [step.step for step in memory.steps if step.incident] == [33]
    table = memory.to_pandas()
    assert "b.weight (50)" in table.loc[33, "incident"]


@pytest.mark.parametrize("make", [of_jsonl, of_memory])
def test_steps_that_there_is_something_to_say_of_are_written_at_any_cadence(make, tmp_path):
    log, read = make(tmp_path, {"every": 100, "per_parameter": 1})
    training = Training(log)
    spiking(training)
    training.clipper.close()
    assert [*read().items()] == [(0, {"a": 1.0}), (33, {"b.weight": 50.0})]


def test_a_sink_that_does_not_ask_gets_plain_steps():
    class Plain(Sink):
        def __init__(self) -> None:
            self.steps = []

        def write(self, steps):
            self.steps += [json.loads(json.dumps(step._asdict())) for step in steps]
            assert len({*steps}) == len(steps)  # they can be hashed

    class Asking(Plain):
        per_parameter = 1

        def write(self, steps):
            self.steps += [{**(step.parameter_norms or {})} for step in steps]

    plain, asking = Plain(), Asking()
    training = Training([plain, asking])
    training.optimizer.step()  # nobody has a gradient
    training.take(*STEPS)
    training.clipper.close()
    assert [step["parameter_norms"] for step in plain.steps] == [None] * 5
    assert asking.steps[:2] == [{}, {"a": 1.0, "b.weight": 2.0, "c": 3.0}]


def test_a_run_that_begins_again_takes_the_place_of_parameters(tmp_path):
    first = Training(TensorBoardSink(tmp_path, per_parameter="all"))
    first.take(*STEPS * 5, (1.0, math.nan, 1.0))
    first.clipper.close()
    again = Training(TensorBoardSink(tmp_path, per_parameter="all", per_parameter_every=3))
    again.clipper.steps = 2
    again.take(*[(2.0, 2.0, 2.0)] * 5)
    again.clipper.close()
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for name in ("a", "b.weight", "c"):
        points = reader.Scalars(f"parameter_norm/{name}")
        assert [point.step for point in points] == [0, 1, 2, 3, 6]
        assert [point.value for point in points][3:] == [2.0, 2.0]
    assert [point.step for point in reader.Scalars("grad_norm/pre")] == [*range(7)]


def test_in_a_table_each_parameter_has_a_column():
    memory = MemorySink(per_parameter=1)
    training = Training(memory)
    training.take(*STEPS)
    training.clipper.close()
    table = memory.to_pandas()
    columns = [name for name in table.columns if name.startswith("parameter_norm")]
    assert columns == ["parameter_norm/c", "parameter_norm/a", "parameter_norm/b.weight"]
    assert table["parameter_norm/a"].fillna(-1).tolist() == [-1, 5.0, -1, -1]


@pytest.mark.parametrize("of_writer", [False, True])
def test_clippers_on_one_directory_keep_their_parameters_apart(tmp_path, of_writer):
    where = SummaryWriter(str(tmp_path)) if of_writer else tmp_path
    trainings = [Training(TensorBoardSink(where, per_parameter="all")) for _ in range(2)]
    for norm, training in enumerate(trainings, 1):
        training.take((float(norm),) * 3)
    for training in trainings:
        training.clipper.close()
    reader = EventAccumulator(str(tmp_path)).Reload()
    for norm, prefix in enumerate(("parameter_norm", "parameter_norm_2"), 1):
        assert [p.value for p in reader.Scalars(f"{prefix}/b.weight")] == [norm]


def test_a_logger_with_names_of_its_own_has_them_below(tmp_path):
    logged: list[dict[str, float]] = []
    sink = CallableSink(lambda numbers, step: logged.append(numbers), prefix="d", per_parameter=1)
    training = Training(sink)
    training.take(STEPS[0])
    training.clipper.close()
    assert logged[0]["d/parameter_norm/c"] == 3.0
