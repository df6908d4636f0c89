"""Adaptive gradient clipping without a hook, against the published formula unit by unit."""

import math

import pytest
import torch
from torch import Tensor, nn

import gradclip
from gradclip import ArgumentError, GradientClipper, GradientError
from gradclip.thresholds import RelativeToWeights
from tests.support.reference import norm_of, parameter_with


def unit_network(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return parameters of every number of dimensions, weights and gradients of unlike sizes."""
    torch.manual_seed(0)
    parameters = []
    for shape in ((6, 3, 3, 3), (5, 300), (7,), (), (3, 2, 4)):
        factors = torch.rand(shape[:1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
        factors = factors if shape else torch.tensor(1.0)
        weight = (torch.randn(shape) * factors).to(dtype)
        gradient = (torch.randn(shape) * factors.flip(0) * 0.02).to(dtype)
        parameters.append(parameter_with(gradient, value=weight))
    return [*parameters, parameter_with(torch.ones(2, 2).to(dtype))]  # weights at 0 can learn


def clipped_by_hand(parameter: nn.Parameter, factor: float, eps: float, order: float) -> Tensor:
    """Return the gradient after AGC in float64: unit by unit, by the formula of the paper."""
    gradient, weight = parameter.grad.double(), parameter.data.double()
    whole = gradient.dim() < 2
    units = []
    for g, w in [(gradient, weight)] if whole else zip(gradient, weight, strict=True):
        threshold, norm = factor * max(norm_of([w], order), eps), norm_of([g], order)
        units.append(g * (threshold / norm) if norm > threshold else g)
    return units[0] if whole else torch.stack(units)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_unit_is_clipped_by_the_norm_of_its_weights(dtype, order):
    parameters = unit_network(dtype)
    before = [(p.grad.clone(), p.data.clone()) for p in parameters]
    needed = [clipped_by_hand(p, 0.02, 1e-3, order) for p in parameters]
    total = gradclip.clip_grad_units_(parameters, 0.02, norm_type=order)
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    for parameter, gradient, (_, weight) in zip(parameters, needed, before, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=tolerance, atol=0)
        assert torch.equal(parameter.data, weight)
    changed = [not torch.equal(p.grad, old) for p, (old, _) in zip(parameters, before, strict=True)]
    assert sum(changed) >= 3
    assert total.shape == ()
    assert total.item() == pytest.approx(norm_of([old for old, _ in before], order), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("way", ["hook", "compiled"])
def test_the_hook_and_compiled_code_do_the_same(way):
    ours, theirs = unit_network(), unit_network()
    gradclip.clip_grad_units_(ours)
    if way == "hook":
        optimizer = torch.optim.SGD(theirs, lr=0.0)
        GradientClipper(optimizer, RelativeToWeights(), scope="unit")
        optimizer.step()
    else:
        torch.compile(lambda: gradclip.clip_grad_units_(theirs), backend="eager")()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))


def test_a_unit_that_is_not_finite_stays():
    weight = parameter_with(torch.tensor([[math.nan, 5.0], [5.0, 0.0]]), value=1.0)
    total = gradclip.clip_grad_units_(weight)
    assert weight.grad.nan_to_num(7.0)[0].tolist() == [7.0, 5.0]
    assert weight.grad[1].norm().item() == pytest.approx(0.01 * 2**0.5)
    assert math.isnan(total.item())


def test_parameters_are_read_once_and_count_once():
    """Layouts of other shapes are found anew."""
    idle = nn.Parameter(torch.ones(1))
    for rows in (2, 3, 2):
        weight = parameter_with(torch.ones(rows, 1), value=1.0)
        norm = gradclip.clip_grad_units_(p for p in (weight, idle, weight))
        assert norm.item() == pytest.approx(rows**0.5)
        assert weight.grad.flatten().tolist() == pytest.approx([0.01] * rows)
    assert gradclip.clip_grad_units_([idle]).item() == 0.0
    assert gradclip.clip_grad_units_([]).item() == 0.0


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_invalid_arguments_are_refused(name, bad):
    weight = parameter_with(torch.ones(2, 2), value=1.0)
    with pytest.raises(ArgumentError):
        gradclip.clip_grad_units_([weight], **{name: bad})
    with pytest.raises(GradientError, match="Found a str among the parameters"):
        gradclip.clip_grad_units_([weight, "weight"])
    assert bool((weight.grad == 1).all())
