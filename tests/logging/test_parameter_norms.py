"""The norms of parameters beside the norm of all."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink, Scope
from gradclip.records.parameter_norms import ParameterNorms, ParameterSums

NAN, INF = math.nan, math.inf


def norms_of(named: dict[str, float], order: float = 2.0) -> ParameterNorms:
    sums = [norm if order == INF else norm**order for norm in named.values()]
    values = torch.tensor([7.0, *sums, 9.0], dtype=torch.float64)
    return ParameterNorms(ParameterSums([*named], []), values, 1, order)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
def test_norms_are_found_by_name(order):
    found = norms_of({"a": 3.0, "b": 0.0, "c": 4.0}, order)
    assert dict(found) == pytest.approx({"a": 3.0, "b": 0.0, "c": 4.0})
    assert (len(found), [*found]) == (3, ["a", "b", "c"])
    with pytest.raises(KeyError):
        found["d"]


def test_the_largest_come_first_and_those_that_are_no_numbers_before_them():
    found = norms_of({"a": 3.0, "b": INF, "c": 4.0, "d": NAN, "e": 1.0})
    assert [*found.largest(3)] == ["d", "b", "c"]
    assert found.largest(3)["c"] == 4.0
    assert [*found.largest(9)] == ["d", "b", "c", "a", "e"]
    assert [*found] == ["a", "b", "c", "d", "e"]
    assert found.largest(0) == {}


def test_those_that_carry_most_are_as_few_as_possible():
    found = norms_of({"a": 1.0, "b": 10.0, "c": 2.0, "d": 9.0})
    assert [*found.carrying(0.5, 5)] == ["b"]
    assert [*found.carrying(0.9, 5)] == ["b", "d"]
    assert [*found.carrying(0.999, 5)] == ["b", "d", "c", "a"]
    assert [*found.carrying(0.999, 3)] == ["b", "d", "c"]
    assert [*norms_of({"a": 1.0, "b": 10.0}, INF).carrying(0.9, 5)] == ["b"]


def test_copies_hold_the_norms_of_their_step_alone():
    found = norms_of({"a": 3.0, "b": 4.0})
    assert pickle.loads(pickle.dumps(found)) == copy.deepcopy(found) == {"a": 3.0, "b": 4.0}
    assert repr(found) == "{'a': 3.0, 'b': 4.0}"


# At a step


class Model(nn.Module):
    """Parameters of several shapes and dtypes, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 4))
        self.brain = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.zeros(2))
        self.wide = nn.Parameter(torch.zeros(2, 2, 2, dtype=torch.float64))
        self.number = nn.Parameter(torch.zeros(()))
        self.c = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.table = nn.Parameter(torch.zeros(2, 5))


def with_gradients(model: nn.Module, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name != "unused":
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = values.to(parameter.dtype)
    return {name: p for name, p in model.named_parameters() if p.grad is not None}


def logged(model: nn.Module, optimizers, **options) -> dict[str, float]:
    """Take a step with each optimizer, and return the norms that were logged last."""
    sink = MemorySink(per_parameter="all")
    with GradientClipper(optimizers, 0.5, model=model, log=sink, **options):
        for optimizer in optimizers:
            optimizer.step()
    return sink.steps[-1].parameter_norms


def needed(named: dict[str, nn.Parameter], order: float) -> dict[str, float]:
    return {
        name: torch.linalg.vector_norm(p.grad.to(torch.complex128), order).item()
        for name, p in named.items()
    }


SCOPES = {
    "global": "global",
    "parameter": "parameter",
    "unit": "unit",
    "rows": lambda name, p: [None, "a", "b"] if name == "matrix" else "c",
    "two": lambda name, p: name[0],
}


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
def test_each_parameter_has_its_norm_before_clipping(scope, order, engine):
    model = Model()
    named = with_gradients(model)
    expected = needed(named, order)
    if scope == "rows":  # the first row of the matrix is in no norm
        rows = named["matrix"].grad[1:].double()
        expected["matrix"] = torch.linalg.vector_norm(rows, order).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"scope": SCOPES[scope], "norm_type": order, "engine": engine}
    found = logged(model, [optimizer], **options)
    assert found == pytest.approx(expected, rel=1e-6)


def test_gradients_of_one_row_each_have_their_norms():
    parameters = [nn.Parameter(torch.zeros(1, size)) for size in (4, 9)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer, sink = torch.optim.SGD(parameters, lr=0.0), MemorySink(per_parameter="all")
    with GradientClipper(optimizer, None, scope="unit", log=sink):
        optimizer.step()
    assert [*sink.steps[0].parameter_norms.values()] == [4.0, 6.0]


def test_what_is_in_no_norm_has_none_of_its_own():
    model = Model()
    expected = needed(with_gradients(model), 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = logged(model, [optimizer], scope=Scope(exclude=["matrix", "c*"]))
    assert found == pytest.approx(
        {k: expected[k] for k in ("brain", "table", "wide", "number")}, rel=1e-6
    )


def test_a_gradient_that_parameters_share_is_that_of_the_first():
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = second.grad = torch.tensor([3.0, 4.0])
    third.grad = torch.ones(2)
    optimizer = torch.optim.SGD([("a", first), ("b", second), ("c", third)], lr=0.0)
    for scope in ("global", "group"):
        sink = MemorySink(per_parameter="all")
        with GradientClipper(optimizer, None, log=sink, scope=scope):
            optimizer.step()
        assert sink.steps[0].parameter_norms == pytest.approx({"a": 5.0, "c": math.sqrt(2)})


def test_the_parameters_of_several_optimizers_keep_their_names():
    model = Model()
    named = with_gradients(model)
    expected = needed(named, 2.0)
    halves = [[*named.values()][::2], [*named.values()][1::2]]
    optimizers = [torch.optim.SGD(half, lr=0.0) for half in halves]
    assert logged(model, optimizers) == pytest.approx(expected, rel=1e-6)
    named["brain"].grad = torch.ones(5, dtype=torch.bfloat16)  # new at the second's own step
    sink = MemorySink(per_parameter="all")
    with GradientClipper([*reversed(optimizers)], None, model=model, log=sink):
        optimizers[0].step()
        named["brain"].grad = torch.full((5,), 2.0, dtype=torch.bfloat16)
        optimizers[1].step()
    assert sink.steps[1].parameter_norms["brain"] == pytest.approx(math.sqrt(20))


def test_a_parameter_that_is_added_has_a_name():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer, sink = torch.optim.SGD([first], lr=0.0), MemorySink(per_parameter="all")
    with GradientClipper(optimizer, None, log=sink):
        first.grad = torch.tensor([2.0])
        optimizer.step()
        optimizer.add_param_group({"params": [second]})
        second.grad = torch.tensor([3.0])
        optimizer.step()
    names = [[*step.parameter_norms.values()] for step in sink.steps]
    assert names == [[2.0], [2.0, 3.0]]
    assert [*sink.steps[1].parameter_norms] == ["group 0, parameter 0", "group 1, parameter 0"]


def test_parameters_that_are_moved_keep_their_names():
    model = Model()
    named = with_gradients(model)
    del named["number"]
    before = needed(named, 2.0)
    groups = [{"params": [*named.values()][:2]}, {"params": [*named.values()][2:]}]
    optimizer, sink = torch.optim.SGD(groups, lr=0.0), MemorySink(per_parameter="all")
    with GradientClipper(optimizer, None, model=model, log=sink):
        optimizer.step()
        first, second = (group["params"] for group in optimizer.param_groups)
        second.append(first.pop(0))
        optimizer.step()
        second.reverse()
        named["wide"].grad[0] = NAN
        optimizer.step()
    assert sink.steps[0].parameter_norms == pytest.approx(before)
    one, other, third = (step.parameter_norms for step in sink.steps)
    assert one == other
    assert [*one] != [*other]
    assert [name for name, norm in third.items() if not math.isfinite(norm)] == ["wide"]
    assert "from wide (4 of 8 elements)" in sink.steps[2].incident


def test_norms_of_high_order_survive_the_scale():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, sink = torch.optim.SGD([parameter], lr=0.0, fused=True), MemorySink(per_parameter=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with GradientClipper(optimizer, None, log=sink, norm_type=100.0):
        scaler.scale((parameter * 1e-3).sum()).backward()
        scaler.step(optimizer)
    assert [*sink.steps[0].parameter_norms.values()] == [pytest.approx(1e-3 * 2**0.01)]


@pytest.mark.parametrize("order", [2.0, INF])
def test_a_scaled_gradient_has_its_true_norm(order):
    parameter = nn.Parameter(torch.zeros(2))
    optimizer, sink = torch.optim.SGD([parameter], lr=0.0, fused=True), MemorySink(per_parameter=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with GradientClipper(optimizer, 0.1, log=sink, norm_type=order):
        scaler.scale((parameter * torch.tensor([3.0, 4.0])).sum()).backward()
        scaler.step(optimizer)
        scaler.update(8.0)  # in place, before anything is read
    assert [*sink.steps[0].parameter_norms.values()] == pytest.approx([4.0 if order == INF else 5])


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
@pytest.mark.parametrize("sizes", [[7, 300], [20_000], [5] * 70])
def test_logging_changes_no_bit_of_a_step(scope, engine, sizes):
    found = []
    for log in (None, MemorySink(per_parameter="all")):
        generator = torch.Generator().manual_seed(1)
        parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        with GradientClipper(optimizer, 0.3, scope=scope, engine=engine, log=log) as clipper:
            optimizer.step()
        found.append([*parameters, clipper.last.norm])
    assert all(map(torch.equal, *found))


def test_nothing_is_kept_of_parameters_where_nobody_logs():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    with GradientClipper(optimizer, 1.0) as clipper:
        optimizer.step()
        assert clipper.last.parameter_sums is None
