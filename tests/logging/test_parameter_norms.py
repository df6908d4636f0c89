"""The norm of each parameter's gradient, beside the norm of all.

The model of a clipper's life has shared gradients, and parameters that are added.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink, Scope
from tests.support.clippers import stepped
from tests.support.curves import Kept, log_named
from tests.support.reference import norm_of, parameter_with

NAN, INF = math.nan, math.inf


def parameter_norms_in(sink):
    return [step.parameter_norms for step in sink.steps]


def test_mapping():
    """A copy holds the norms of its step alone, not those of the whole batch."""
    sink = Kept(per_parameter=1)
    log_named(sink, "abc", (3.0, 0.0, 4.0), (1.0, 1.0, 1.0))
    norms, _ = parameter_norms_in(sink)
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
    log_named(sink := MemorySink(per_parameter=count), "abcde", (3.0, INF, 4.0, NAN, 1.0))
    [norms] = parameter_norms_in(sink)
    assert [*(norms or "")] == [*names]
    assert not count or norms["c"] == 4.0


SHAPES = {
    "matrix": (3, 4),
    "brain": (5,),
    "unused": (2,),
    "wide": (2, 2, 2),
    "number": (),
    "c": (3,),
    "table": (1, 5),
    "row": (1, 9),
}
DTYPES = {"brain": torch.bfloat16, "wide": torch.float64, "c": torch.complex64}


class ShapesAndDtypes(nn.Module):
    """Parameters of several shapes and dtypes, one without a gradient."""

    def __init__(self):
        super().__init__()
        generator, self.named = torch.Generator().manual_seed(0), {}
        for name, shape in SHAPES.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            parameter = parameter_with(values.to(DTYPES.get(name, torch.float32)))
            self.register_parameter(name, parameter)
            self.named[name] = parameter
        self.named.pop("unused").grad = None

    def norms(self, order=2.0):
        return {name: norm_of([p.grad], order) for name, p in self.named.items()}


SCOPES = {
    "global": "global",
    "parameter": "parameter",
    "unit": "unit",
    "rows": lambda name, p: [None, "a", "b"] if name == "matrix" else "c",
    "two": lambda name, p: name[0],
    "excluding": Scope(exclude=["matrix", "c*"]),
}


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, INF])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
def test_each_parameter_has_its_norm_before_clipping(scope, order, engine):
    model = ShapesAndDtypes()
    needed = model.norms(order)
    if scope == "rows":  # the first row of the matrix is in no norm
        needed["matrix"] = norm_of([model.matrix.grad[1:]], order)
    if scope == "excluding":
        del needed["matrix"], needed["c"]
    options = {"scope": SCOPES[scope], "engine": engine, "model": model, "norm_type": order}
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.0), Kept(per_parameter=1)
    stepped(optimizer, 0.5, log=sink, **options).close()
    assert parameter_norms_in(sink) == [pytest.approx(needed, rel=1e-6)]


def test_parameters_of_several_optimizers():
    """They keep their names; a gradient that is made between two steps counts at the second."""
    model, sink = ShapesAndDtypes(), Kept(per_parameter=1)
    needed, parameters = model.norms(), [*model.named.values()]
    optimizers = [torch.optim.SGD(half, lr=0.0) for half in (parameters[:2], parameters[2:])]
    with GradientClipper(optimizers, None, model=model, log=sink):
        optimizers[1].step()
        model.brain.grad = torch.full((5,), 2.0, dtype=torch.bfloat16)
        optimizers[0].step()
    one, other = parameter_norms_in(sink)
    assert one == pytest.approx(needed, rel=1e-6)
    assert other["brain"] == pytest.approx(math.sqrt(20))


def test_parameters_that_are_moved_keep_their_names():
    model, sink = ShapesAndDtypes(), MemorySink(per_parameter="all")
    model.named.pop("number").grad = None
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
    one, other, third = parameter_norms_in(sink)
    assert one == other == pytest.approx(needed, rel=1e-6)
    assert [*one] != [*other]
    assert [name for name, norm in third.items() if not math.isfinite(norm)] == ["wide"]
    assert "from wide (4 of 8 elements)" in sink.steps[2].incident


@pytest.mark.parametrize(
    ("order", "needed"), [(2.0, 5e-3), (INF, 4e-3), (100.0, 4e-3 * (1 + 0.75**100) ** 0.01)]
)
def test_scaled_gradient_has_its_true_norm(order, needed):
    """Also of a high order, for which a power of the scale would overflow."""
    parameter, sink = nn.Parameter(torch.zeros(2)), Kept(per_parameter=1)
    optimizer = torch.optim.SGD([parameter], lr=0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with GradientClipper(optimizer, 1e-4, log=sink, norm_type=order):
        scaler.scale((parameter * torch.tensor([3e-3, 4e-3])).sum()).backward()
        scaler.step(optimizer)
        scaler.update(8.0)  # in place, before anything is read
    assert [*parameter_norms_in(sink)[0].values()] == [pytest.approx(needed)]


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
@pytest.mark.parametrize("engine", ["auto", "operators", "reference"])
@pytest.mark.parametrize("sizes", [[7, 300], [20_000], [5] * 70])
def test_logging_changes_no_bit_of_a_step(scope, engine, sizes):
    """Without a log nothing is kept of parameters."""
    results = []
    for log in (None, MemorySink(per_parameter="all")):
        generator = torch.Generator().manual_seed(1)
        parameters = [parameter_with(torch.randn(size, generator=generator)) for size in sizes]
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        clipper = stepped(optimizer, 0.3, scope=scope, engine=engine, log=log)
        assert (clipper.last.parameter_sums is None) == (log is None)
        results.append([*parameters, clipper.last.norm])
    assert all(map(torch.equal, *results))
