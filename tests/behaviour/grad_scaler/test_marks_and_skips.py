"""What a step under a GradScaler leaves on an optimizer: its marks, skips, limits and states."""

import math
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import OptState

from gradclip import AttachError, GradientClipper, MemorySink, SkipLimitError
from tests.support import scaled_training as amp
from tests.support.reference import bits_in
from tests.support.twins import (
    PlannedError,
    Twins,
    assert_tensors_close,
    gradients_of,
    has_marks,
    joint_norm,
    joint_scaler,
    layers,
    parameters_of,
    values_of,
)


def raise_planned(*_: object) -> None:
    raise PlannedError


@amp.unscaled_or_not
@amp.fused_kinds
def test_after_a_hook_that_raised_a_step_without_the_scaler_is_right(kind, unscale, route):
    twins, scaler = Twins(lambda: [amp.scaled_optimizer(kind)]), joint_scaler()
    [ours], [theirs] = twins.ours, twins.theirs
    failing = ours.register_step_pre_hook(raise_planned)
    scaler.scale(amp.scaled_loss(0, ours)).backward()
    if unscale:
        scaler.unscale_(ours)
    with pytest.raises(PlannedError):
        scaler.step(ours)
    failing.remove()
    ours.zero_grad()
    for optimizer in (ours, theirs):
        amp.scaled_loss(0, optimizer).backward()
    ours.step()
    twins.take_by_hand()
    assert twins.clipper.steps == 1
    assert joint_norm(ours) == pytest.approx(1.0, rel=1e-6)
    assert not has_marks(ours)
    assert_tensors_close(values_of(ours), values_of(theirs))


@amp.all_kinds
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_a_hook_that_raised_without_a_scaler_leaves_nothing_of_ours(kind, exceed, route):
    optimizer = amp.scaled_optimizer(kind)
    GradientClipper(optimizer, amp.SPIKE, exceed=exceed)
    amp.scaled_loss(2, optimizer).backward()
    optimizer.step()
    failing = optimizer.register_step_pre_hook(raise_planned)
    amp.scaled_loss(0, optimizer).backward()
    gradients, values = [p.grad for p in parameters_of(optimizer)], gradients_of(optimizer)
    try:
        optimizer.step()
    except PlannedError:
        failing.remove()
    assert not has_marks(optimizer)
    assert [id(p.grad) for p in parameters_of(optimizer)] == [*map(id, gradients)]
    assert exceed == "scale" or bits_in(gradients) == bits_in(values)


@amp.unscaled_or_not
@amp.all_kinds
def test_an_overflow_does_not_interrupt_skips_in_a_row(kind, unscale, route):
    optimizer = amp.scaled_optimizer(kind)
    clipper = GradientClipper(optimizer, amp.SPIKE, exceed="skip", skip_limit=2)
    scaler, reached = joint_scaler(), []
    for step, factor in enumerate((1e-3, 1, math.inf, 1)):
        optimizer.zero_grad()
        scaler.scale(amp.scaled_loss(0, optimizer) * factor).backward()
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
@amp.fused_kinds
def test_a_skip_limit_that_only_the_device_knows(
    kind, limit, losses, flushes, raises, asks, device_route
):
    """It raises once, where a batch of records or a flush shows that it was reached."""
    optimizer, sink = amp.scaled_optimizer(kind), MemorySink(flush_every=4 if raises == 3 else 100)
    clipper = GradientClipper(optimizer, amp.SPIKE, exceed="skip", skip_limit=limit, log=sink)
    reached: list[Any] = []
    for step, which in enumerate(losses):
        optimizer.zero_grad()
        amp.scaled_loss(which, optimizer).backward()
        try:
            optimizer.step()
        except SkipLimitError:
            reached.append(step)
        assert not has_marks(optimizer)
        assert all(p.grad is not None for p in parameters_of(optimizer))
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


@pytest.mark.parametrize("policy", [{"exceed": "skip"}, {"nonfinite": "skip"}], ids=str)
@amp.fused_kinds
def test_marks_of_a_user_are_the_same_objects_after_a_skip(kind, policy, route):
    optimizer = amp.scaled_optimizer(kind)
    clipper = GradientClipper(optimizer, amp.SPIKE, **policy)
    optimizer.found_inf, optimizer.grad_scale = marks = torch.tensor(0.0), torch.tensor(4.0)
    for step in (1, 0, 2):
        optimizer.zero_grad()
        (amp.scaled_loss(step, optimizer) * 4).backward()
        if step == 0 and "nonfinite" in policy:
            parameters_of(optimizer)[1].grad[0] = math.inf
        before = bits_in(values_of(optimizer))
        optimizer.step()
        assert optimizer.found_inf is marks[0]
        assert optimizer.grad_scale is marks[1]
        assert [mark.item() for mark in marks] == [0.0, 4.0]
        assert (step == 0) == (bits_in(values_of(optimizer)) == before)
    assert (clipper.steps, clipper.skipped) == (3, 1)


@amp.fused_kinds
def test_a_found_inf_of_a_user_skips_the_step(kind, route):
    optimizer = amp.scaled_optimizer(kind)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise")
    amp.scaled_loss(1, optimizer).backward()
    optimizer.step()
    before = bits_in(values_of(optimizer))
    parameters_of(optimizer)[0].grad.fill_(math.inf)
    optimizer.found_inf = mine = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.found_inf is mine
    assert bits_in(values_of(optimizer)) == before
    assert (clipper.steps, clipper.skipped, clipper.clip_rate()) == (1, 0, 0.0)


@pytest.mark.parametrize("scaled", [True, False])
@amp.fused_kinds
def test_a_grad_scale_of_a_user_counts_into_the_norm(kind, scaled, route):
    optimizer = amp.scaled_optimizer(kind)
    clipper, scaler = GradientClipper(optimizer, 1.0), joint_scaler(enabled=scaled)
    amp.scaled_loss(0, optimizer).backward()
    norm = joint_norm(optimizer)
    optimizer.zero_grad()
    optimizer.grad_scale = torch.tensor(4.0)
    scaler.scale(amp.scaled_loss(0, optimizer) * 4).backward()
    scaler.step(optimizer)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert joint_norm(optimizer) == pytest.approx(1.0, rel=1e-6)


@amp.unscaled_or_not
@amp.some_kinds
def test_the_state_right_after_overflows(kind, unscale, route):
    (_, rows), states = amp.scaled_by_hand(kind, **amp.SKIP), []

    def compare(step: int, run: amp.Run) -> None:
        count = step + 1 - sum(overflow <= step for overflow in amp.OVERFLOWS)
        states.append(state := run.clipper.state_dict())
        counters = state["counters"]
        assert state["steps"] == counters["finite"] == count
        assert counters["skipped_steps"] == sum(row[4] for row in rows[:count])
        assert counters["nonfinite_steps"] == 0

    run = amp.trained(kind, each=compare, unscale=unscale, **amp.SKIP)
    assert len(states) == amp.STEPS
    for clipper in (
        GradientClipper(amp.scaled_optimizer(kind), amp.SPIKE, exceed="skip"),
        run.clipper,
    ):
        clipper.load_state_dict(states[14])  # right after an overflow
        assert clipper.steps == 12
        assert clipper.state_dict() == states[14]


@amp.fused_kinds
def test_steps_can_be_set_after_overflows_that_only_the_device_knows(kind, route):
    def set_steps(step: int, run: amp.Run) -> None:
        if step == 5:
            run.clipper.steps = 100
            assert run.clipper.steps == 100

    run = amp.trained(kind, each=set_steps)
    assert [row[0] for row in run.rows] == [0, 1, 2, 3, *range(100, 117)]
    assert run.clipper.steps == 117


class OldContract(torch.optim.SGD):
    """An optimizer that unscales by itself, in its step, as GradScaler once had it."""

    _step_supports_amp_scaling = True

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
    optimizer, scaler = OldContract(layers(3), lr=0.1), joint_scaler()
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise")
    scaler.scale(amp.scaled_loss(0, optimizer)).backward()
    before, gradients = values_of(optimizer), gradients_of(optimizer)
    with pytest.raises(AttachError, match="OldContract .*call grad_scaler.unscale_"):
        scaler.step(optimizer)
    found = bits_in([values_of(optimizer), gradients_of(optimizer)])
    assert found == bits_in([before, gradients])
    assert clipper.steps == 0
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert joint_norm(optimizer) == pytest.approx(1.0, rel=1e-6)
    for now, earlier, step in zip(
        values_of(optimizer), before, gradients_of(optimizer), strict=True
    ):
        torch.testing.assert_close(now, earlier - 0.1 * step)
    before = bits_in(values_of(optimizer))
    scaler.scale(amp.scaled_loss(0, optimizer) * math.inf).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert bits_in(values_of(optimizer)) == before
    assert clipper.steps == 1
    for disabled in (False, True):  # it serves without a scaler, too
        optimizer.zero_grad()
        amp.scaled_loss(0, optimizer).backward()
        joint_scaler(enabled=False).step(optimizer) if disabled else optimizer.step()
        assert joint_norm(optimizer) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 3
