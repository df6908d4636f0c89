"""AGC without a hook, held against the published formula unit by unit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientClipper, GradientError
from gradclip.thresholds import RelativeToWeights


def network(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return parameters of every number of dimensions, weights and gradients of unlike sizes."""
    torch.manual_seed(0)
    made = []
    for shape in ((6, 3, 3, 3), (5, 300), (7,), (), (3, 2, 4)):
        factors = torch.rand(shape[:1], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
        factors = factors if shape else torch.tensor(1.0)
        parameter = nn.Parameter((torch.randn(shape) * factors).to(dtype))
        parameter.grad = (torch.randn(shape) * factors.flip(0) * 0.02).to(dtype)
        made.append(parameter)
    return made


def by_hand(parameter: nn.Parameter, factor: float, eps: float, order: float) -> torch.Tensor:
    """Return the gradient after AGC in float64: unit by unit, by the formula of the paper."""
    gradient, weight = parameter.grad.double(), parameter.data.double()
    whole = gradient.dim() < 2
    found = []
    for g, w in [(gradient, weight)] if whole else zip(gradient, weight, strict=True):
        most = factor * max(torch.linalg.vector_norm(w.flatten(), order).item(), eps)
        norm = torch.linalg.vector_norm(g.flatten(), order).item()
        found.append(g * (most / norm) if norm > most else g)
    return found[0] if whole else torch.stack(found)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_unit_is_clipped_by_the_norm_of_its_weights(dtype, order):
    parameters = network(dtype)
    before = [p.grad.clone() for p in parameters]
    needed = [by_hand(p, 0.02, 1e-3, order) for p in parameters]
    weights = [p.data.clone() for p in parameters]
    total = gradclip.clip_grad_units_(parameters, 0.02, norm_type=order)
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 1e-6
    changed = 0
    for parameter, gradient, weight, old in zip(parameters, needed, weights, before, strict=True):
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=tolerance, atol=0)
        assert torch.equal(parameter.data, weight)
        changed += not torch.equal(parameter.grad, old)
    assert changed >= 3
    exact = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in before]), order)
    assert total.shape == ()
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_it_does_what_the_hook_does():
    ours, hooked = network(), network()
    gradclip.clip_grad_units_(ours)
    optimizer = torch.optim.SGD(hooked, lr=0.0)
    GradientClipper(optimizer, RelativeToWeights(), scope="unit")
    optimizer.step()
    for one, other in zip(ours, hooked, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_weights_at_zero_can_learn():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    gradclip.clip_grad_units_(weight, 0.01, eps=1e-3)
    assert weight.grad.norm(dim=1).tolist() == pytest.approx([1e-5, 1e-5])


def test_a_unit_that_is_not_finite_stays_as_it_is():
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.tensor([[math.nan, 5.0], [5.0, 0.0]])
    total = gradclip.clip_grad_units_(weight)
    assert weight.grad.nan_to_num(7.0)[0].tolist() == [7.0, 5.0]
    assert weight.grad[1].norm().item() == pytest.approx(0.01 * 2**0.5)
    assert math.isnan(total.item())


def test_rows_of_sparse_gradients_have_the_norms_of_their_weights():
    table = nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 1.0], [30.0, 40.0]]))
    table.grad = torch.sparse_coo_tensor([[2, 0, 2]], [[1.0, 0], [1.0, 0], [1.0, 0]], (3, 2))
    gradclip.clip_grad_units_([table])
    assert table.grad.to_dense().tolist() == [
        pytest.approx([0.05, 0.0]),
        [0.0, 0.0],
        pytest.approx([0.5, 0.0]),
    ]


def test_parameters_are_read_once_and_count_once():
    weight, idle = nn.Parameter(torch.ones(1, 4)), nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1, 4)
    norm = gradclip.clip_grad_units_(p for p in (weight, idle, weight))
    assert norm.item() == 2.0
    assert weight.grad.norm().item() == pytest.approx(0.02)
    assert gradclip.clip_grad_units_([idle]).item() == 0.0
    assert gradclip.clip_grad_units_([]).item() == 0.0


def test_the_layout_is_found_anew_when_shapes_change():
    for rows in (2, 3, 2):
        weight = nn.Parameter(torch.ones(rows, 1))
        weight.grad = torch.ones(rows, 1)
        gradclip.clip_grad_units_([weight])
        assert weight.grad.flatten().tolist() == pytest.approx([0.01] * rows)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True, "1", None])
@pytest.mark.parametrize("name", ["clip_factor", "eps"])
def test_impossible_numbers_are_refused(name, bad):
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    with pytest.raises(ArgumentError):
        gradclip.clip_grad_units_([weight], **{name: bad})
    assert bool((weight.grad == 1).all())


def test_what_is_no_tensor_is_refused():
    with pytest.raises(GradientError, match="Found a str among the parameters"):
        gradclip.clip_grad_units_(["weight"])


@pytest.mark.filterwarnings("ignore:.*Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_function_clips_as_another():
    ours, compiled = network(), network()
    gradclip.clip_grad_units_(ours)
    torch.compile(lambda: gradclip.clip_grad_units_(compiled), backend="eager")()
    for one, other in zip(ours, compiled, strict=True):
        assert torch.equal(one.grad, other.grad)
