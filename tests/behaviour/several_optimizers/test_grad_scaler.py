"""Several optimizers under one GradScaler: one scale, one norm, and overflows of some of them."""

import itertools
import math
from contextlib import nullcontext

import pytest
import torch

from gradclip import AttachError, GradientClipper
from tests.support.reference import bits_in
from tests.support.scaled_training import Learning
from tests.support.twins import (
    LIMIT,
    PlannedError,
    Twins,
    assert_within,
    either_order,
    fused_or_not,
    gradients_of,
    has_marks,
    joint_loss,
    joint_norm,
    joint_scaler,
    layers,
    mixed,
    parameters_of,
    scaled_round,
    values_of,
    watch,
)

scaling = pytest.mark.parametrize(
    ("unscale", "given"),
    [(False, True), (True, True), (True, False)],
    ids=["grad_scaler=", "grad_scaler= and unscale_", "unscale_"],
)


@pytest.mark.parametrize("raising", [None, "max_norm", "a hook"])
@scaling
@either_order
@fused_or_not
def test_the_true_joint_norm(fused, order, unscale, given, raising):
    """Overflows and errors leave no trace: the others train as clipped by hand."""
    broken, overflows, now = (1, 4, 5, 8) if raising else (), (2, 6), 0

    def fail(*_: object) -> None:
        if now in broken:
            raise PlannedError

    scaler, scales = joint_scaler(), []
    twins = Twins(
        lambda: mixed(fused),
        (lambda _: fail() or 1.0) if raising == "max_norm" else 1.0,
        grad_scaler=scaler if given else None,
    )
    if raising == "a hook":
        twins.ours[order[0]].register_step_pre_hook(fail)
    for now in range(11):
        twins.zero_grad(set_to_none=now % 3 == 0 or now - 1 in broken)
        try:
            infinite = now in overflows
            scaled_round(twins.ours, scaler, order, step=now, unscale=unscale, infinite=infinite)
        except PlannedError:
            assert now in broken
        else:
            assert now not in broken
        # A hook that raises leaves GradScaler's own marks, as without a clipper.
        assert raising == "a hook" or not has_marks(*twins.ours)
        scales.append(scaler.get_scale())
        scaler.update()
        if now not in (*broken, *overflows):
            joint_loss(now, twins.theirs).backward()
            twins.take_by_hand()
    assert twins.clipper.steps == 9 - len(broken)
    assert {0.5, 2.0} <= {after / before for before, after in itertools.pairwise(scales)}
    twins.check()


@scaling
@pytest.mark.parametrize("overflow", [0, 1])
@either_order
@fused_or_not
def test_an_overflow_in_one(fused, order, overflow, unscale, given, route):
    """It skips that one alone; the other is clipped by its own norm, which teaches no rule."""
    scaler, rule, norms = joint_scaler(), Learning(), []
    options = {"grad_scaler": scaler if given else None}
    if route == "host":
        options["nonfinite"] = "raise"
    twins = Twins(lambda: mixed(fused), rule, **options)
    for step in range(4):
        twins.zero_grad()
        joint_loss(step, twins.theirs).backward()
        infinite, stepping = None, order
        if step in (1, 2):
            infinite, stepping = overflow, [1 - overflow]
            twins.theirs[overflow].zero_grad()
        scaled_round(twins.ours, scaler, order, step=step, unscale=unscale, overflow=infinite)
        scaler.update()
        norms.append(twins.take_by_hand(stepping))
    assert [norm for _, norm, _ in rule.learned] == pytest.approx([norms[0], norms[3]], rel=1e-5)
    assert (twins.clipper.steps, twins.clipper.skipped) == (4, 0)
    assert twins.clipper.state_dict()["counters"]["nonfinite_steps"] == 0
    twins.check()


@pytest.mark.parametrize(
    ("given", "unscaled"),
    [(True, None), (True, 0), (True, 1), (False, None), (False, 0)],
    ids=["given", "given, first unscaled", "given, last unscaled", "none", "none, first unscaled"],
)
@either_order
@fused_or_not
def test_scales_that_differ(fused, order, given, unscaled):
    """The clipper needs the scaler to unscale the others; else nothing is stepped."""
    scaler = joint_scaler()
    twins = Twins(lambda: mixed(fused), grad_scaler=scaler if given else None)
    before = values_of(*twins.ours)
    scaler.scale(joint_loss(0, twins.ours)).backward()
    joint_loss(0, twins.theirs).backward()
    if unscaled is not None:
        scaler.unscale_(twins.ours[order[unscaled]])
    if given:
        for number in order:
            scaler.step(twins.ours[number])
        twins.take_by_hand()
        twins.check()
        return
    with pytest.raises(AttachError, match="scales differ: give the clipper grad_scaler="):
        scaler.step(twins.ours[order[0]])
    assert all(map(torch.equal, values_of(*twins.ours), before))
    assert twins.clipper.steps == 0
    assert not has_marks(*twins.ours)


@pytest.fixture(params=itertools.product([True, False], repeat=2), ids=str)
def scaled_pair(request):
    """Return two optimizers, fused or not, their scaler, and a clipper that has it."""
    optimizers, scaler = mixed(request.param), joint_scaler()
    return optimizers, scaler, GradientClipper(optimizers, 1.0, grad_scaler=scaler)


@either_order
def test_direct_steps(scaled_pair, order):
    """Scaled gradients are refused, and clipped once they were unscaled by hand."""
    optimizers, scaler, clipper = scaled_pair
    scaler.scale(joint_loss(0, optimizers)).backward()
    before = bits_in([values_of(*optimizers), gradients_of(*optimizers)])
    with pytest.raises(AttachError, match="still scaled by grad_scaler: call grad_scaler.step"):
        optimizers[order[0]].step()
    assert bits_in([values_of(*optimizers), gradients_of(*optimizers)]) == before
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    for number in order:
        optimizers[number].step()
    assert joint_norm(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("first", [0, 1], ids=["stepped one first", "other one first"])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step"])
def test_gradients_added_to_those_of_another_scale(scaled_pair, unscale, first, overflow):
    """They are refused, unless an overflow makes them useless."""
    optimizers, scaler, clipper = scaled_pair
    scaled_round(optimizers, scaler, [0], overflow=1 if overflow else None)  # unscales both
    scaler.update()
    optimizers[0].zero_grad()
    before = values_of(*optimizers)
    scaler.scale(joint_loss(1, optimizers)).backward()
    if unscale:
        scaler.unscale_(optimizers[first])
    with nullcontext() if overflow else pytest.raises(AttachError, match="another scale"):
        scaler.step(optimizers[first])
    taken = int(overflow and first == 0)
    assert all(map(torch.equal, values_of(*optimizers[taken:]), before[taken:]))
    assert clipper.steps == 1 + taken


def test_gradients_added_to_an_optimizer_that_has_stepped(scaled_pair):
    """They carry the scale until the scaler's update, and are in no norm before."""
    optimizers, scaler, clipper = scaled_pair
    scaler.scale((parameters_of(optimizers[0])[0] ** 2).sum()).backward()
    scaler.step(optimizers[0])
    scaler.scale(joint_loss(1, optimizers)).backward()
    norm = joint_norm(optimizers[1]) / scaler.get_scale()
    scaler.step(optimizers[1])
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_computed_after_the_unscaling(scaled_pair, set_to_none):
    """They are refused, as GradScaler takes them for unscaled, unless it was updated."""
    optimizers, scaler, clipper = scaled_pair
    scaled_round(optimizers, scaler, [0])  # unscales both
    optimizers[1].zero_grad(set_to_none=set_to_none)
    scaler.scale(joint_loss(1, optimizers)).backward()
    with pytest.raises(AttachError, match="SGD were computed after they had been unscaled"):
        scaler.step(optimizers[1])
    for step in (1, 2):  # optimizers with losses of their own, an update after each
        clipper.zero_grad()
        scaler.update()
        scaled_round(optimizers, scaler, [step % 2], step=step)
    assert clipper.steps == 3


@fused_or_not
def test_a_parameter_that_both_hold_is_not_unscaled_twice(fused):
    first, second = layers()
    optimizers = [
        torch.optim.Adam([first, second], lr=0.05, fused=fused[0]),
        torch.optim.SGD([second], lr=0.05, fused=fused[1]),
    ]
    scaler, before = joint_scaler(), values_of(*optimizers)
    GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaler.scale((first**2).sum() + (second**2).sum()).backward()
    with pytest.raises(AttachError, match="Two of the optimizers hold the same parameter"):
        scaler.step(optimizers[0])
    assert all(map(torch.equal, values_of(*optimizers), before))


@pytest.mark.parametrize("kept", [True, False], ids=["accumulated", "set to None"])
@either_order
def test_one_skipped_for_its_overflow_or_without_gradients(scaled_pair, order, kept):
    """Its gradients of another scale are not refused, as they are infinite or absent."""
    optimizers, scaler, clipper = scaled_pair
    scaled_round(optimizers, scaler, order)
    scaler.update()
    clipper.zero_grad()
    scaled_round(optimizers, scaler, order, step=1, overflow=1)
    steps = watch(*optimizers)
    for step in range(2, 5):
        scaler.update()
        for optimizer in optimizers[: 1 if kept else 2]:
            optimizer.zero_grad()
        scaled_round(optimizers, scaler, order, step=step)
        assert joint_norm(optimizers[0]) <= LIMIT
    assert_within(steps)
    assert clipper.steps == 5
    assert math.isfinite(joint_norm(optimizers[1])) is not kept
