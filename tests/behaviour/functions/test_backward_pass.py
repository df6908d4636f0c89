"""Gradients of states during the backward pass: clipped one by one, and measured through time."""

import math

import pytest
import torch
from torch import Tensor, nn

from gradclip import ArgumentError, GradientError, clip_backward, through_time
from tests.support.reference import norm_of

F64 = torch.float64


def sent_back(gradient: Tensor, **options) -> Tensor:
    """Return what is left of a gradient that flows back through clip_backward."""
    x = torch.zeros(gradient.shape, dtype=gradient.dtype, requires_grad=True)
    clip_backward(x, **options).backward(gradient)
    return x.grad


def test_it_is_the_identity_forward_and_clips_the_whole_tensor_backward():
    x, gradient = torch.randn(2, 3), torch.randn(2, 3)
    given = gradient.clone()
    assert torch.equal(clip_backward(x, 1.0), x)
    assert not clip_backward(x, 1.0).requires_grad
    found = sent_back(gradient, max_norm=0.1)
    torch.testing.assert_close(found, gradient * 0.1 / gradient.norm())
    assert torch.equal(gradient, given)  # others may hold it
    for dtype in (torch.float32, F64, torch.bfloat16):
        below = torch.randn(50).to(dtype)
        assert torch.equal(sent_back(below, max_norm=1e3), below)
    clip_backward(expanded := torch.zeros(4, requires_grad=True), 1.0).sum().backward()
    assert expanded.grad.tolist() == [0.5] * 4


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


def unrolled(cell: nn.Module, steps: int) -> list:
    torch.manual_seed(0)
    state = torch.zeros(3, cell.hidden_size, dtype=F64)
    state = (state, state) if isinstance(cell, nn.LSTMCell) else state
    states = []
    for _ in range(steps):
        state = cell(torch.randn(3, cell.input_size, dtype=F64), state)
        states.append(state)
    return states


def norms_by_hand(states: list, loss: Tensor, order: float = 2.0) -> list[float]:
    """Return the same norms from autograd's own gradients of every state."""
    norms = []
    for state in states:
        tensors = state if isinstance(state, tuple) else (state,)
        found = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        norms.append(norm_of([gradient for gradient in found if gradient is not None], order))
    return norms


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_each_state_has_the_norm_of_its_gradient(kind, order):
    """And the gradients of the cell are those without it."""
    cell = kind(4, 6, dtype=F64)
    states = unrolled(cell, 7)
    last = states[-1][0] if kind is nn.LSTMCell else states[-1]
    loss = last.square().sum()
    needed = norms_by_hand(states, loss, order)
    gradients = torch.autograd.grad(loss, [*cell.parameters()], retain_graph=True)
    recorded = through_time(states, order)
    loss.backward()
    assert all(map(torch.equal, gradients, [p.grad for p in cell.parameters()]))
    assert (len(recorded), recorded.norms.dtype) == (7, F64)
    assert recorded.norms.tolist() == pytest.approx(needed, rel=1e-12)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1e9, [2.0 ** (9 - step) for step in range(10)]), (4.0, [8.0] * 7 + [4.0, 2.0, 1.0])],
)
def test_a_linear_state_grows_by_its_factor_until_it_is_clipped(limit, expected):
    state, states = torch.ones(1, requires_grad=True), []
    for _ in range(10):
        state = clip_backward(state * 2, max_norm=limit)
        states.append(state)
    recorded = through_time(states)
    state.sum().backward()
    assert recorded.norms.tolist() == pytest.approx(expected)


def test_the_newest_backward_pass_counts(tape):
    """A state that no gradient reaches has the norm 0; nothing waits for a device."""
    states = unrolled(nn.RNNCell(2, 3, dtype=F64), 5)
    with tape:
        recorded = through_time(states)
        before, loss = recorded.norms, states[2].sum()
        loss.backward(retain_graph=True)
        first = recorded.norms
        (3 * loss).backward()
        second = recorded.norms
    assert before.tolist() == [0.0] * 5
    assert (first > 0).tolist() == [True, True, True, False, False]
    assert second.tolist() == pytest.approx((3 * first).tolist())


@pytest.mark.parametrize(
    ("gradient", "expected"), [([0.1, 0.2], [0.1, 0.2]), ([30.0, 40.0], [0.6, 0.8])]
)
def test_the_scale_of_a_grad_scaler_does_not_count(gradient, expected):
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    x = torch.zeros(2, requires_grad=True)
    y = clip_backward(x, max_norm=1.0, max_value=50.0, grad_scaler=scaler)
    recorded = through_time([y], grad_scaler=scaler)
    scaler.scale((y * torch.tensor(gradient)).sum()).backward()
    assert (x.grad / 65536.0).tolist() == pytest.approx(expected)
    assert recorded.norms.tolist() == pytest.approx([math.hypot(*gradient)])
    assert through_time([]).norms.shape == (0,)


def differentiate_twice() -> None:
    """Ask for a second derivative, which would be wrong."""
    x = torch.ones(2, requires_grad=True)
    loss = (clip_backward(x, 1.0) ** 2).sum()
    [gradient] = torch.autograd.grad(loss, x, create_graph=True)
    gradient.sum().backward()


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (differentiate_twice, RuntimeError, "differentiate twice"),
        (lambda: clip_backward(ONE), ArgumentError, "Neither max_norm nor max_value is given"),
        (lambda: clip_backward(ONE, -1.0), ArgumentError, "max_norm is -1.0: give a finite number"),
        (lambda: clip_backward(ONE * 1j, max_value=1.0), GradientError, "complex"),
        (lambda: through_time([nn.Parameter(ONE) * 1, "h"]), GradientError, "Found a str as the"),
        (lambda: through_time([ONE]), GradientError, "time step 0 does not require a grad"),
        (lambda: through_time([], norm_type=0.0), ArgumentError, "norm_type"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
