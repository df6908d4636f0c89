"""Norms of the gradient of a recurrent state, time step by time step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import gradclip
from gradclip import ArgumentError, GradientError, through_time
from tests.support.reference import norm_of

F64 = torch.float64


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


def test_a_linear_state_grows_by_its_factor_until_it_is_clipped():
    for limit, expected in (
        (1e9, [2.0 ** (9 - step) for step in range(10)]),
        (4.0, [8.0] * 7 + [4.0, 2.0, 1.0]),
    ):
        state, states = torch.ones(1, requires_grad=True), []
        for _ in range(10):
            state = gradclip.clip_backward(state * 2, max_norm=limit)
            states.append(state)
        recorded = through_time(states)
        state.sum().backward()
        assert recorded.norms.tolist() == pytest.approx(expected)


def test_the_newest_backward_pass_counts():
    """A state that no gradient reaches has the norm 0."""
    states = unrolled(nn.RNNCell(2, 3, dtype=F64), 5)
    recorded = through_time(states)
    assert recorded.norms.tolist() == [0.0] * 5
    loss = states[2].sum()
    loss.backward(retain_graph=True)
    first = recorded.norms
    assert (first > 0).tolist() == [True, True, True, False, False]
    (3 * loss).backward()
    assert recorded.norms.tolist() == pytest.approx((3 * first).tolist())


def test_the_scale_of_a_grad_scaler_does_not_count():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    states = unrolled(nn.RNNCell(2, 3, dtype=F64), 4)
    loss = states[-1].sum()
    needed = norms_by_hand(states, loss)
    recorded = through_time(states, grad_scaler=scaler)
    scaler.scale(loss).backward()
    assert recorded.norms.tolist() == pytest.approx(needed)


def test_nothing_waits_for_a_device(tape):
    states = unrolled(nn.RNNCell(2, 3, dtype=F64), 4)
    with tape:
        recorded = through_time(states)
        states[-1].sum().backward()
        norms = recorded.norms
    assert norms.shape == (4,)


def test_what_is_refused():
    """No states at all are none of it."""
    assert through_time([]).norms.shape == (0,)
    with pytest.raises(GradientError, match="Found a str as the state of time step 1"):
        through_time([torch.ones(1, requires_grad=True) * 1, "h"])
    with torch.no_grad(), pytest.raises(GradientError, match="time step 0 does not require a grad"):
        through_time([torch.ones(1) * 2])
    with pytest.raises(ArgumentError, match="norm_type"):
        through_time([], norm_type=0.0)
