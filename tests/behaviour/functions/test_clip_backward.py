"""Clipping a gradient during the backward pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gradclip
from gradclip import ArgumentError, GradientError


def sent_back(gradient: Tensor, **options) -> Tensor:
    """Return what is left of a gradient that flows back through clip_backward."""
    x = torch.zeros(gradient.shape, dtype=gradient.dtype, requires_grad=True)
    gradclip.clip_backward(x, **options).backward(gradient)
    return x.grad


def test_it_is_the_identity_forward_and_clips_the_whole_tensor_backward():
    x, gradient = torch.randn(2, 3), torch.randn(2, 3)
    given = gradient.clone()
    assert torch.equal(gradclip.clip_backward(x, 1.0), x)
    assert not gradclip.clip_backward(x, 1.0).requires_grad
    found = sent_back(gradient, max_norm=0.1)
    torch.testing.assert_close(found, gradient * 0.1 / gradient.norm())
    assert torch.equal(gradient, given)  # others may hold it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_below_the_threshold_it_changes_nothing(dtype):
    gradient = torch.randn(50).to(dtype)
    assert torch.equal(sent_back(gradient, max_norm=1e3), gradient)


@pytest.mark.parametrize(
    ("gradient", "options", "expected"),
    [
        ([30.0, 4.0], {"max_value": 4.0}, [4.0, 4.0]),
        ([30.0, 4.0], {"max_value": 4.0, "max_norm": 1.0}, [math.sqrt(0.5)] * 2),
        ([1e3, math.inf], {"max_value": 0.5, "max_norm": 1.0}, [1e3, math.inf]),
        ([1e20] * 4, {"max_norm": 1.0}, [0.5] * 4),
    ],
)
def test_values_are_bounded_first(gradient, options, expected):
    """A gradient that is not finite passes, one beyond float32's squares is clipped."""
    assert sent_back(torch.tensor(gradient), **options).tolist() == pytest.approx(expected)


def test_expanded_gradients_are_clipped():
    x = torch.zeros(4, requires_grad=True)
    gradclip.clip_backward(x, 1.0).sum().backward()
    assert x.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("gradient", "expected"), [([0.1, 0.2], [0.1, 0.2]), ([30.0, 40.0], [0.6, 0.8])]
)
def test_the_scale_of_a_grad_scaler_does_not_count(gradient, expected):
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x = torch.zeros(2, requires_grad=True)
    y = gradclip.clip_backward(x, max_norm=1.0, max_value=50.0, grad_scaler=scaler)
    scaler.scale((y * torch.tensor(gradient)).sum()).backward()
    assert (x.grad / 65536.0).tolist() == pytest.approx(expected)


def test_what_is_refused():
    """A second derivative, which would be wrong; no limit; complex elements with a bound."""
    x = torch.ones(2, requires_grad=True)
    loss = (gradclip.clip_backward(x, 1.0) ** 2).sum()
    [gradient] = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    with pytest.raises(ArgumentError, match="Neither max_norm nor max_value is given"):
        gradclip.clip_backward(torch.ones(1))
    with pytest.raises(ArgumentError, match="max_norm is -1.0: give a finite number"):
        gradclip.clip_backward(torch.ones(1), -1.0)
    with pytest.raises(GradientError, match="complex"):
        gradclip.clip_backward(torch.ones(1, dtype=torch.complex64), max_value=1.0)
