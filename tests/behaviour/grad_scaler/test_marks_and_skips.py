"""What a step under a GradScaler leaves on an optimizer: its marks, skips, limits and states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

from gradclip import AttachError, GradientClipper, SkipLimitError
from tests.support.reference import gradient_norm
from tests.support.scaled_training import (
    OVERFLOWS,
    SKIP,
    SPIKE,
    STEPS,
    PlannedError,
    Rows,
    Run,
    all_kinds,
    fresh,
    fused_kinds,
    scaled_by_hand,
    scaled_loss,
    scaler_of,
    some_kinds,
    trained,
    unscaled_or_not,
    values_of,
)
from tests.support.several import has_marks


def raise_planned(*_: object) -> None:
    raise PlannedError


@unscaled_or_not
@fused_kinds
def test_after_a_hook_that_raised_a_step_without_the_scaler_is_right(kind, unscale, route):
    parameters, optimizer = fresh(kind)
    clipper, scaler = GradientClipper(optimizer, 1.0), scaler_of()
    failing = optimizer.register_step_pre_hook(raise_planned)
    scaler.scale(scaled_loss(0, parameters)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(PlannedError):
        scaler.step(optimizer)
    failing.remove()
    optimizer.zero_grad()
    scaled_loss(0, parameters).backward()
    norm = gradient_norm(parameters)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert gradient_norm(parameters) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1
    assert not has_marks(optimizer)
    twins, twin = fresh(kind)
    for parameter, other in zip(twins, parameters, strict=True):
        parameter.grad = other.grad.clone()
    twin.step()
    torch.testing.assert_close(parameters, twins, rtol=1e-6, atol=1e-7)


@all_kinds
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_a_hook_that_raised_without_a_scaler_leaves_nothing_of_ours(kind, exceed, route):
    parameters, optimizer = fresh(kind)
    GradientClipper(optimizer, SPIKE, exceed=exceed)
    scaled_loss(2, parameters).backward()
    optimizer.step()
    failing = optimizer.register_step_pre_hook(raise_planned)
    scaled_loss(0, parameters).backward()
    gradients = [p.grad for p in parameters]
    values = [g.clone() for g in gradients]
    try:
        optimizer.step()
    except PlannedError:
        failing.remove()
    assert not has_marks(optimizer)
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    if exceed == "skip":
        torch.testing.assert_close(gradients, values, rtol=0, atol=0)


# Skips


@unscaled_or_not
@all_kinds
def test_an_overflow_does_not_interrupt_skips_in_a_row(kind, unscale, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=2)
    scaler, reached = scaler_of(), []
    for step, factor in enumerate((1e-3, 1, math.inf, 1)):
        optimizer.zero_grad()
        scaler.scale(scaled_loss(0, parameters) * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        try:
            scaler.step(optimizer)
        except SkipLimitError:
            reached.append(step)
        scaler.update()
    assert reached == ([3] if route == "host" else [])
    if route == "device":
        with pytest.raises(SkipLimitError, match="2 steps in a row were skipped"):
            clipper.flush()
    assert (clipper.steps, clipper.skipped) == (3, 2)


LIMITS = [
    # limit, losses (0 is one to skip), flush after each step, at which step it raises
    (3, (1, 0, 0, 0, 0, 1), False, "flush"),
    (3, (1, 0, 0, 1, 0, 0), True, None),
    (2, (1, 0, 0, 0, 1), False, 3),
]


@pytest.mark.parametrize("asks", [True, False], ids=["skipped is asked first", ""])
@pytest.mark.parametrize(("limit", "losses", "flushes", "raises"), LIMITS)
@fused_kinds
def test_a_skip_limit_that_only_the_device_knows(
    kind, limit, losses, flushes, raises, asks, device_route
):
    """It raises once, where a batch of records or a flush shows that it was reached."""
    parameters, optimizer = fresh(kind)
    sink = Rows(flush_every=4 if raises == 3 else 100)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=limit, log=sink)
    reached: list[Any] = []
    for step, which in enumerate(losses):
        optimizer.zero_grad()
        scaled_loss(which, parameters).backward()
        try:
            optimizer.step()
        except SkipLimitError:
            reached.append(step)
        assert not has_marks(optimizer)
        assert all(p.grad is not None for p in parameters)
        if flushes:
            clipper.flush()
    if asks:
        assert clipper.skipped == losses.count(0)
    if raises == "flush":
        with pytest.raises(SkipLimitError, match="3 steps in a row were skipped"):
            clipper.flush()
        reached.append("flush")
    clipper.flush()
    assert reached == ([] if raises is None else [raises])
    assert (clipper.steps, clipper.skipped) == (len(losses), losses.count(0))
    assert [row.skipped for row in sink.steps] == [which == 0 for which in losses]


# Marks that a user has set


@pytest.mark.parametrize("policy", [{"exceed": "skip"}, {"nonfinite": "skip"}], ids=str)
@fused_kinds
def test_marks_of_a_user_are_the_same_objects_after_a_skip(kind, policy, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, **policy)
    optimizer.found_inf, optimizer.grad_scale = marks = torch.tensor(0.0), torch.tensor(4.0)
    for step in (1, 0, 2):
        optimizer.zero_grad()
        (scaled_loss(step, parameters) * 4).backward()
        if step == 0 and "nonfinite" in policy:
            parameters[1].grad[0] = math.inf
        before = values_of(parameters)
        optimizer.step()
        assert optimizer.found_inf is marks[0]
        assert optimizer.grad_scale is marks[1]
        assert [mark.item() for mark in marks] == [0.0, 4.0]
        assert (step == 0) == all(map(torch.equal, parameters, before))
    assert (clipper.steps, clipper.skipped) == (3, 1)


@fused_kinds
def test_a_found_inf_of_a_user_skips_the_step(kind, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise")
    scaled_loss(1, parameters).backward()
    optimizer.step()
    before = values_of(parameters)
    parameters[0].grad.fill_(math.inf)
    optimizer.found_inf = mine = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.found_inf is mine
    assert all(map(torch.equal, parameters, before))
    assert (clipper.steps, clipper.skipped, clipper.clip_rate()) == (1, 0, 0.0)


@pytest.mark.parametrize("scaled", [True, False])
@fused_kinds
def test_a_grad_scale_of_a_user_counts_into_the_norm(kind, scaled, route):
    parameters, optimizer = fresh(kind)
    clipper, scaler = GradientClipper(optimizer, 1.0), scaler_of(enabled=scaled)
    scaled_loss(0, parameters).backward()
    norm = gradient_norm(parameters)
    optimizer.zero_grad()
    optimizer.grad_scale = torch.tensor(4.0)
    scaler.scale(scaled_loss(0, parameters) * 4).backward()
    scaler.step(optimizer)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert gradient_norm(parameters) == pytest.approx(1.0, rel=1e-6)


# States


@unscaled_or_not
@some_kinds
def test_the_state_right_after_overflows(kind, unscale, route):
    rows, states = scaled_by_hand(kind, left_out=OVERFLOWS, **SKIP).rows, []

    def compare(step: int, run: Run) -> None:
        count = step + 1 - sum(overflow <= step for overflow in OVERFLOWS)
        states.append(state := run.clipper.state_dict())
        counters = state["counters"]
        assert state["steps"] == counters["finite"] == count
        assert counters["skipped_steps"] == sum(row[4] for row in rows[:count])
        assert counters["nonfinite_steps"] == 0

    scaling = {"scaler": scaler_of(), "unscale": unscale, "overflows": OVERFLOWS}
    run = trained(kind, each=compare, **scaling, **SKIP)
    assert len(states) == STEPS
    resumed = GradientClipper(fresh(kind)[1], SPIKE, exceed="skip")
    for clipper in (resumed, run.clipper):
        clipper.load_state_dict(states[14])  # right after an overflow
        assert clipper.steps == 12
        assert clipper.state_dict() == states[14]


@fused_kinds
def test_steps_can_be_set_after_overflows_that_only_the_device_knows(kind, route):
    def set_steps(step: int, run: Run) -> None:
        if step == 5:
            run.clipper.steps = 100
            assert run.clipper.steps == 100

    run = trained(kind, scaler=scaler_of(), overflows=OVERFLOWS, each=set_steps)
    assert [row[0] for row in run.rows] == [0, 1, 2, 3, *range(100, 117)]
    assert run.steps == 117


# Optimizers that are handed the scaler


class OldContract(torch.optim.SGD):
    """An optimizer that unscales by itself, in its step, as GradScaler once had it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self._step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        overflowed = False
        if grad_scaler is not None:
            state = grad_scaler._per_optimizer_states[id(self)]
            if state["stage"] is OptState.READY:
                grad_scaler.unscale_(self)
            overflowed = any(found.item() for found in state["found_inf_per_device"].values())
        if not overflowed:
            super().step()


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_an_optimizer_that_unscales_in_its_step():
    """It is refused with scaled gradients, and an overflow is the scaler's own."""
    parameters, _ = fresh("SGD")
    optimizer = OldContract(parameters)
    clipper, scaler = GradientClipper(optimizer, 1.0, nonfinite="raise"), scaler_of()
    scaler.scale(scaled_loss(0, parameters)).backward()
    before, gradients = values_of(parameters), [p.grad.clone() for p in parameters]
    with pytest.raises(AttachError, match="OldContract .*call grad_scaler.unscale_"):
        scaler.step(optimizer)
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, [p.grad for p in parameters], gradients))
    assert clipper.steps == 0
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert gradient_norm(parameters) == pytest.approx(1.0, rel=1e-6)
    for parameter, earlier in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.data, earlier - 0.1 * parameter.grad)
    before = values_of(parameters)
    scaler.scale(scaled_loss(0, parameters) * math.inf).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(map(torch.equal, parameters, before))
    assert clipper.steps == 1
    for disabled in (False, True):  # it serves without a scaler, too
        optimizer.zero_grad()
        scaled_loss(0, parameters).backward()
        scaler_of(enabled=False).step(optimizer) if disabled else optimizer.step()
        assert gradient_norm(parameters) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 3
