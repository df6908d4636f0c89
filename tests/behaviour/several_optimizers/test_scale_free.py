"""Optimizers whose update does not depend on the scale of the gradient, beside others."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gradclip import GradientClipper, MemorySink, Scope


class Lion(SGD):
    """Known by its name, wherever it comes from."""


class PagedLion8bit(SGD):
    """As in bitsandbytes."""


class SignSGD(SGD):
    """As in many packages."""


class MillionSteps(SGD):
    """A name that has the letters of Lion, and no word of it."""


class Quiet(Lion):
    """A subclass, which says of itself that it is not of that kind."""

    ignores_gradient_scale = False


def muon(group: dict[str, Any]) -> Optimizer:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this version of torch has no Muon")
    return torch.optim.Muon([group], lr=0.1)


def marked(group: dict[str, Any]) -> Optimizer:
    optimizer = SGD([group], lr=0.1)
    optimizer.ignores_gradient_scale = True
    return optimizer


def of_kind(kind: type[Optimizer]) -> Callable[[dict[str, Any]], Optimizer]:
    return lambda group: kind([group], lr=0.1)


FREE = {"Muon": muon, "marked": marked}
FREE |= {kind.__name__: of_kind(kind) for kind in (Lion, PagedLion8bit, SignSGD)}
FREE["a subclass"] = of_kind(type("Own", (Lion,), {}))
OTHERS = {kind.__name__: of_kind(kind) for kind in (SGD, MillionSteps, Quiet)}


def beside_adamw(make: Callable[[dict[str, Any]], Optimizer], **keys: Any) -> list[Optimizer]:
    return [make({"params": [matrix()], **keys}), AdamW([matrix()])]


def matrix() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(4, 4))
    parameter.grad = torch.randn(4, 4)
    return parameter


class MuonWithAuxAdam(SGD):
    """As in Keller Jordan's package: Muon for some groups, Adam for the others."""


def two_in_one(**keys: Any) -> Optimizer:
    first = {"params": [matrix()], "use_muon": True, **keys}
    return MuonWithAuxAdam([first, {"params": [matrix()], "use_muon": False}], lr=0.1)


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("make", FREE.values(), ids=FREE)
def test_a_joint_norm_with_another_optimizer_is_warned_of(make):
    """With both ways out, at the line that attaches the clipper."""
    with pytest.warns(UserWarning, match=r"AdamW.*'max_norm': None\}.*scope='group'") as caught:
        GradientClipper(beside_adamw(make), 1.0)
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("make", FREE.values(), ids=FREE)
def test_what_shares_no_norm_needs_no_warning(make):
    GradientClipper(beside_adamw(make, max_norm=None), 1.0)
    GradientClipper(beside_adamw(make, max_norm=2.0), 1.0)
    for scope in ("group", "parameter", "unit", Scope("group")):
        GradientClipper(beside_adamw(make), 1.0, scope=scope)
    GradientClipper(beside_adamw(make), 1.0, exceed="observe")
    GradientClipper(beside_adamw(make)[0], 1.0)
    GradientClipper([beside_adamw(make)[0], beside_adamw(make)[0]], 1.0)


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_optimizers_need_none(make):
    GradientClipper(beside_adamw(make), 1.0)


@pytest.mark.filterwarnings("ignore:.* shares a norm with")
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
@pytest.mark.parametrize("make", [muon, marked])
def test_a_matrix_that_clipping_leaves_near_0_is_an_incident(make, scope):
    """By its name, once; AdamW's is none."""
    optimizers = beside_adamw(make)
    model = nn.Module()
    model.hidden, model.rest = (o.param_groups[0]["params"][0] for o in optimizers)
    sink = MemorySink()
    clipper = GradientClipper(optimizers, 1e-3, scope=scope, model=model, log=sink)
    for scale in (1.0, 1.0, 1e-9):
        model.rest.grad = torch.full((4, 4), scale)
        model.hidden.grad = torch.full((4, 4), scale * (1e-3 if scope == "global" else 1.0))
        clipper.step()
    clipper.close()
    incidents = [row.incident for row in sink.steps]
    if scope == "global":  # 4e-3 of 4, clipped to 1e-3
        assert "below 1e-05 at step 0: hidden (1e-06)" in incidents[0]
        assert "rest" not in incidents[0]
    else:
        assert incidents[0] is None
    assert incidents[1:] == [None] * 2


def test_groups_of_one_optimizer_that_share_a_norm_are_warned_of():
    """One group is served by Muon and the other by Adam."""
    text = (
        r"MuonWithAuxAdam with use_muon=True shares a norm with MuonWithAuxAdam with use_muon=False"
    )
    with pytest.warns(UserWarning, match=text):
        GradientClipper(two_in_one(), 1.0)


@pytest.mark.usefixtures("no_warning")
def test_groups_with_norms_of_their_own_are_not_warned_of():
    GradientClipper(two_in_one(max_norm=None), 1.0)
    GradientClipper(two_in_one(), 1.0, scope="group")


@pytest.mark.usefixtures("no_warning")
def test_measuring_alone_is_not_warned_of():
    GradientClipper(beside_adamw(of_kind(Lion)), None)


@pytest.mark.filterwarnings("ignore:MuonWithAuxAdam with use_muon=True shares a norm")
def test_only_groups_of_muon_are_named_where_clipping_leaves_them_near_zero():
    sink = MemorySink()
    with GradientClipper(optimizer := two_in_one(), 1e-6, log=sink):
        optimizer.step()
    incident = sink.steps[0].incident
    assert "group 0" in incident, incident
    assert "group 1" not in incident
