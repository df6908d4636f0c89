"""The norm of each parameter's gradient, beside the norm of all."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink, Scope, Sink

NAN, INF = math.nan, math.inf


class Asking(Sink):
    """Keeps the parameter norms of each step as they come."""

    per_parameter = 1

    def __init__(self):
        self.norms = []

    def write(self, steps):
        self.norms += [step.parameter_norms for step in steps]


def parameters_with(**norms):
    """Return named parameters of one element, whose gradients have these norms."""
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in norms}
    for parameter, norm in zip(parameters.values(), norms.values(), strict=True):
        parameter.grad = torch.full_like(parameter, norm)
    return [*parameters.items()]


def logged_norms(parameters, *, order=2.0, sink=None, steps=1, **options):
    """Step with the gradients that the parameters have; return the parameter norms of each step."""
    sink = sink or Asking()
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    with GradientClipper(optimizer, 0.5, log=sink, norm_type=order, **options):
        for _ in range(steps):
            optimizer.step()
    return sink.norms if isinstance(sink, Asking) else [s.parameter_norms for s in sink.steps]


def test_mapping():
    """A copy holds the norms of its step alone, not those of the whole batch."""
    norms, _ = logged_norms(parameters_with(a=3.0, b=0.0, c=4.0), steps=2)
    assert dict(norms) == {"a": 3.0, "b": 0.0, "c": 4.0}
    assert (len(norms), [*norms], repr(norms)) == (3, ["a", "b", "c"], repr(dict(norms)))
    copies = copy.deepcopy(norms), pickle.loads(pickle.dumps(norms))
    assert [*map(type, copies)] == [dict, dict]
    assert copies[0] == copies[1] == norms
    with pytest.raises(KeyError):
        norms["d"]


@pytest.mark.parametrize(
    ("count", "names"), [(0, ""), (3, "dbc"), (5, "dbcae"), (9, "dbcae"), ("all", "abcde")]
)
def test_largest_come_first(count, names):
    """NaN and infinity come before them."""
    parameters = parameters_with(a=3.0, b=INF, c=4.0, d=NAN, e=1.0)
    [norms] = logged_norms(parameters, sink=MemorySink(per_parameter=count))
    assert [*(norms or "")] == [*names]
    assert not count or norms["c"] == 4.0


class ShapesAndDtypes(nn.Module):
    """Parameters of several shapes and dtypes, one without a gradient."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 4))
        self.brain = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
        self.unused = nn.Parameter(torch.zeros(2))
        self.wide = nn.Parameter(torch.zeros(2, 2, 2, dtype=torch.float64))
        self.number = nn.Parameter(torch.zeros(()))
        self.c = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.table = nn.Parameter(torch.zeros(1, 5))
        self.row = nn.Parameter(torch.zeros(1, 9))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name != "unused":
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.grad = values.to(parameter.dtype)
        self.named = {name: p for name, p in self.named_parameters() if p.grad is not None}

    def norms(self, order=2.0):
        """Return the norm of each gradient, in float64."""
        return {
            name: torch.linalg.vector_norm(p.grad.to(torch.complex128), order).item()
            for name, p in self.named.items()
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
    model = ShapesAndDtypes()
    needed = model.norms(order)
    if scope == "rows":  # the first row of the matrix is in no norm
        rows = model.matrix.grad[1:].double()
        needed["matrix"] = torch.linalg.vector_norm(rows, order).item()
    options = {"scope": SCOPES[scope], "engine": engine, "model": model}
    [norms] = logged_norms(model.parameters(), order=order, **options)
    assert norms == pytest.approx(needed, rel=1e-6)


def test_excluded_parameters_have_none():
    model, scope = ShapesAndDtypes(), Scope(exclude=["matrix", "c*"])
    needed = {name: model.norms()[name] for name in ("brain", "table", "wide", "number", "row")}
    [norms] = logged_norms(model.parameters(), scope=scope, model=model)
    assert norms == pytest.approx(needed, rel=1e-6)


@pytest.mark.parametrize("scope", ["global", "group"])
def test_gradient_that_parameters_share_is_that_of_the_first(scope):
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = second.grad = torch.tensor([3.0, 4.0])
    third.grad = torch.ones(2)
    [norms] = logged_norms([("a", first), ("b", second), ("c", third)], scope=scope)
    assert norms == pytest.approx({"a": 5.0, "c": math.sqrt(2)})


def test_parameters_of_several_optimizers():
    """They keep their names; a gradient that is made between two steps counts at the second."""
    model, sink = ShapesAndDtypes(), Asking()
    needed = model.norms()
    halves = [[*model.named.values()][:2], [*model.named.values()][2:]]
    optimizers = [torch.optim.SGD(half, lr=0.0) for half in halves]
    with GradientClipper(optimizers, None, model=model, log=sink):
        optimizers[1].step()
        model.brain.grad = torch.full((5,), 2.0, dtype=torch.bfloat16)
        optimizers[0].step()
    assert sink.norms[0] == pytest.approx(needed, rel=1e-6)
    assert sink.norms[1]["brain"] == pytest.approx(math.sqrt(20))


def test_parameter_that_is_added_has_a_name():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer, sink = torch.optim.SGD([first], lr=0.0), Asking()
    with GradientClipper(optimizer, None, log=sink):
        first.grad = torch.tensor([2.0])
        optimizer.step()
        optimizer.add_param_group({"params": [second]})
        second.grad = torch.tensor([3.0])
        optimizer.step()
    one, both = ("group 0, parameter 0", 2.0), ("group 1, parameter 0", 3.0)
    assert [[*norms.items()] for norms in sink.norms] == [[one], [one, both]]


def test_parameters_that_are_moved_keep_their_names():
    model, sink = ShapesAndDtypes(), MemorySink(per_parameter="all")
    model.number.grad = None
    del model.named["number"]
    needed, parameters = model.norms(), [*model.named.values()]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    with GradientClipper(optimizer, None, model=model, log=sink):
        optimizer.step()
        first, second = (group["params"] for group in optimizer.param_groups)
        second.append(first.pop(0))
        optimizer.step()
        second.reverse()
        model.wide.grad[0] = NAN
        optimizer.step()
    one, other, third = (step.parameter_norms for step in sink.steps)
    assert one == other == pytest.approx(needed, rel=1e-6)
    assert [*one] != [*other]
    assert [name for name, norm in third.items() if not math.isfinite(norm)] == ["wide"]
    assert "from wide (4 of 8 elements)" in sink.steps[2].incident


@pytest.mark.parametrize(
    ("order", "needed"), [(2.0, 5e-3), (INF, 4e-3), (100.0, 4e-3 * (1 + 0.75**100) ** 0.01)]
)
def test_scaled_gradient_has_its_true_norm(order, needed):
    """Also of a high order, for which a power of the scale would overflow."""
    parameter, sink = nn.Parameter(torch.zeros(2)), Asking()
    optimizer = torch.optim.SGD([parameter], lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with GradientClipper(optimizer, 1e-4, log=sink, norm_type=order):
        scaler.scale((parameter * torch.tensor([3e-3, 4e-3])).sum()).backward()
        scaler.step(optimizer)
        scaler.update(8.0)  # in place, before anything is read
    assert [*sink.norms[0].values()] == [pytest.approx(needed)]


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
@pytest.mark.parametrize("sizes", [[7, 300], [20_000], [5] * 70])
def test_logging_changes_no_bit_of_a_step(scope, engine, sizes):
    """Without a log nothing is kept of parameters."""
    results = []
    for log in (None, MemorySink(per_parameter="all")):
        generator = torch.Generator().manual_seed(1)
        parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        with GradientClipper(optimizer, 0.3, scope=scope, engine=engine, log=log) as clipper:
            optimizer.step()
        assert (clipper.last.parameter_sums is None) == (log is None)
        results.append([*parameters, clipper.last.norm])
    assert all(map(torch.equal, *results))
