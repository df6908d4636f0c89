from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import gradclip
from gradclip import ArgumentError, GradientError, through_time


def unrolled(cell, steps, *, seed=0, batch=3):
    torch.manual_seed(seed)
    state = torch.zeros(batch, cell.hidden_size, dtype=torch.float64)
    state = (state, state) if isinstance(cell, nn.LSTMCell) else state
    states = []
    for _ in range(steps):
        state = cell(torch.randn(batch, cell.input_size, dtype=torch.float64), state)
        states.append(state)
    return states


def by_hand(states, loss, order=2.0):
    """The same norms from autograd's own gradients of every state."""
    norms = []
    for state in states:
        parts = state if isinstance(state, tuple) else (state,)
        found = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        flat = [gradient.flatten() for gradient in found if gradient is not None]
        norms.append(torch.linalg.vector_norm(torch.cat(flat), order).item() if flat else 0.0)
    return norms


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_norms_are_those_of_the_gradient_of_each_state(kind, order):
    torch.manual_seed(1)
    states = unrolled(kind(4, 6, dtype=torch.float64), 7)
    last = states[-1][0] if kind is nn.LSTMCell else states[-1]
    loss = last.square().sum()
    needed = by_hand(states, loss, order)
    watched = through_time(states, order)
    loss.backward()
    assert len(watched) == 7
    assert watched.norms.dtype == torch.float64
    assert watched.norms.tolist() == pytest.approx(needed, rel=1e-12)


def test_a_linear_state_grows_by_its_factor():
    state = torch.ones(1, requires_grad=True)
    states = []
    for _ in range(20):
        state = state * 1.3
        states.append(state)
    watched = through_time(states)
    state.sum().backward()
    assert watched.norms.tolist() == pytest.approx([1.3 ** (19 - t) for t in range(20)], rel=1e-6)


def test_states_that_no_gradient_reaches_have_the_norm_0():
    states = unrolled(nn.RNNCell(2, 3, dtype=torch.float64), 5)
    watched = through_time(states)
    assert watched.norms.tolist() == [0.0] * 5
    states[2].sum().backward()
    norms = watched.norms.tolist()
    assert all(norm > 0 for norm in norms[:3])
    assert norms[3:] == [0.0, 0.0]


def test_the_newest_backward_pass_counts():
    states = unrolled(nn.RNNCell(2, 3, dtype=torch.float64), 4)
    watched = through_time(states)
    loss = states[-1].sum()
    loss.backward(retain_graph=True)
    first = watched.norms
    (3 * loss).backward()
    assert watched.norms.tolist() == pytest.approx((3 * first).tolist())


def test_gradients_stay_as_they_are():
    found = []
    for watch in (False, True):
        torch.manual_seed(3)
        cell = nn.RNNCell(2, 3, dtype=torch.float64)
        states = unrolled(cell, 6)
        if watch:
            through_time(states)
        states[-1].sum().backward()
        found.append([parameter.grad.clone() for parameter in cell.parameters()])
    assert all(map(torch.equal, *found))


def test_clipping_through_time_shows():
    state, states = torch.ones(1, requires_grad=True), []
    for _ in range(10):
        state = gradclip.clip_backward(state * 2, max_norm=4.0)
        states.append(state)
    watched = through_time(states)
    state.sum().backward()
    assert watched.norms.tolist() == pytest.approx([8.0] * 7 + [4.0, 2.0, 1.0])


def test_under_a_grad_scaler_norms_are_those_of_the_loss():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    states = unrolled(nn.RNNCell(2, 3, dtype=torch.float64), 4)
    loss = states[-1].sum()
    needed = by_hand(states, loss)
    watched = through_time(states, grad_scaler=scaler)
    scaler.scale(loss).backward()
    assert watched.norms.tolist() == pytest.approx(needed)


def test_half_precision_neither_overflows_nor_rounds():
    state = torch.full((1000,), 300.0, dtype=torch.bfloat16, requires_grad=True)
    states = [state * 1, state * 1]
    watched = through_time(states)
    (states[0].float() * 3e37).sum().backward()
    exact = torch.tensor(3e37).bfloat16().double().item() * math.sqrt(1000)
    assert watched.norms.tolist() == pytest.approx([exact, 0.0], rel=1e-6)


def test_nothing_waits_for_a_device(tape):
    states = unrolled(nn.RNNCell(2, 3, dtype=torch.float64), 4)
    with tape:
        watched = through_time(states)
        states[-1].sum().backward()
        norms = watched.norms
    assert norms.shape == (4,)


def test_no_states_have_no_norms():
    assert through_time([]).norms.shape == (0,)


def test_what_is_no_state_is_refused():
    with pytest.raises(GradientError, match="Found a str as the state of time step 1"):
        through_time([torch.ones(1, requires_grad=True) * 1, "h"])
    with torch.no_grad(), pytest.raises(GradientError, match="time step 0 does not require a grad"):
        through_time([torch.ones(1) * 2])
    with pytest.raises(ArgumentError, match="norm_type"):
        through_time([], norm_type=0.0)
