"""Several optimizers of one clipper: which gradients share a norm, and when they are clipped."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper, NonFiniteGradientError
from tests.support.several import (
    LIMIT,
    Twins,
    assert_tensors_close,
    assert_within,
    either_order,
    fused_or_not,
    gradients_of,
    has_marks,
    joint_loss,
    joint_norm,
    joint_scaler,
    joint_values,
    mixed,
    pair,
    parameters_of,
    scaled_round,
    watch,
    weights,
)

# One backward, several optimizers


@pytest.mark.parametrize("count", [2, 3])
@either_order
def test_one_norm(order, count):
    """All gradients are scaled by one factor at the first step; one record is made."""
    optimizers = pair()
    if count == 3:
        optimizers.append(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
        (parameters_of(optimizers[2])[0] ** 2).sum().backward()
    clipper = GradientClipper(optimizers, 1.0)
    joint_loss(0, optimizers).backward()
    norm, before = joint_norm(*optimizers), gradients_of(*optimizers)
    assert norm > 2
    steps, values = watch(*optimizers), joint_values(*optimizers)
    order = (*order, 2)[:count]
    for number in order:
        optimizers[number].step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-9)
    assert clipper.last.clipped_norm.item() == pytest.approx(1.0)
    assert joint_norm(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert_tensors_close(gradients_of(*optimizers), [g / norm for g in before])
    needed = [v - 0.1 * g / norm for v, g in zip(values, before, strict=True)]
    assert_tensors_close(joint_values(*optimizers), needed)
    assert [number for number, _ in steps] == list(order)


def sparse_and_dense() -> list[torch.optim.Optimizer]:
    torch.manual_seed(0)
    table, output = nn.Embedding(20, 4).weight, nn.Linear(4, 3).weight
    return [torch.optim.SparseAdam([table], lr=0.05), torch.optim.Adam([output], lr=0.05)]


def loss_of_words(step: int, optimizers: list[torch.optim.Optimizer]) -> torch.Tensor:
    table, output = parameters_of(*optimizers)
    generator = torch.Generator().manual_seed(step)
    indices = torch.randint(0, 6, (16,), generator=generator)  # most of them more than once
    rows = nn.functional.embedding(indices, table, sparse=True)
    return ((rows @ output.T) ** 2).sum(1).mean() * (0.3, 5.0, 20.0)[step % 3]


@pytest.mark.parametrize("rounds", [1, 3], ids=["each", "accumulated"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "disabled scaler"])
@either_order
def test_sparse_and_dense_gradients(order, scaled, rounds):
    scaler = joint_scaler(enabled=scaled)
    twins = Twins(sparse_and_dense, grad_scaler=scaler)
    for step in range(12):
        scaler.scale(loss_of_words(step, twins.ours)).backward()
        loss_of_words(step, twins.theirs).backward()
        if step % rounds:
            continue
        for number in order:
            scaler.step(twins.ours[number])
        scaler.update()
        twins.take_by_hand(tolerance=1e-4)
        twins.zero_grad()
    assert twins.clipper.steps == 12 // rounds
    assert twins.clipper.clip_rate() > 0
    twins.check(tolerance=1e-4)


def test_step_and_zero_grad_reach_all():
    """A closure is refused, since each optimizer would evaluate it anew."""
    twins = Twins(pair)
    for optimizers in (twins.ours, twins.theirs):
        joint_loss(0, optimizers).backward()
    before = joint_values(*twins.ours)
    with pytest.raises(ArgumentError, match=r"step\(\) was given a closure.* 2 optimizers"):
        twins.clipper.step(lambda: joint_loss(0, twins.ours))
    assert all(map(torch.equal, joint_values(*twins.ours), before))
    assert twins.clipper.step() is None
    twins.take_by_hand()
    twins.check()
    twins.clipper.zero_grad(set_to_none=False)
    assert [p.grad.abs().max().item() for p in parameters_of(*twins.ours)] == [0.0, 0.0]
    twins.clipper.zero_grad()
    assert [p.grad for p in parameters_of(*twins.ours)] == [None, None]


def test_a_closure_of_one_optimizer():
    """It may compute the gradients of the others as well."""
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    norms = []

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = joint_loss(0, optimizers)
        loss.backward()
        norms.append(joint_norm(*optimizers))
        return loss

    optimizers[0].step(closure)
    optimizers[1].step()
    assert clipper.steps == len(norms) == 1
    assert clipper.last.norm.item() == pytest.approx(norms[0], rel=1e-9)
    assert joint_norm(*optimizers) == pytest.approx(1.0, rel=1e-6)


@either_order
def test_a_group_with_its_own_max_norm(order):
    first, second = weights()
    alone = nn.Parameter(torch.ones(3))
    optimizers = [
        torch.optim.SGD([{"params": [first]}, {"params": [alone], "max_norm": 0.5}], lr=0.1),
        torch.optim.SGD([second], lr=0.1),
    ]
    clipper = GradientClipper(optimizers, 1.0)
    (joint_loss(0, [torch.optim.SGD([w]) for w in (first, second)]) + (alone**2).sum()).backward()
    own = alone.grad.norm().item()
    joint = math.hypot(first.grad.norm().item(), second.grad.norm().item())
    for number in order:
        optimizers[number].step()
    assert clipper.labels == ("global", "optimizer 0, group 1")
    assert clipper.last.norm.tolist() == pytest.approx([joint, own], rel=1e-6)
    assert alone.grad.norm().item() == pytest.approx(0.5, rel=1e-6)
    assert math.hypot(first.grad.norm(), second.grad.norm()) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


@either_order
def test_a_parameter_that_both_hold(order):
    """Its gradient counts and is scaled once."""
    first, second = weights()
    optimizers = [torch.optim.SGD([first, second], lr=0.1), torch.optim.SGD([second], lr=0.2)]
    clipper = GradientClipper(optimizers, 1.0)
    steps, values = watch(*optimizers), [first.detach().clone(), second.detach().clone()]
    joint_loss(0, [torch.optim.SGD([w]) for w in (first, second)]).backward()
    before = [first.grad.clone(), second.grad.clone()]
    norm = math.hypot(*(g.norm().item() for g in before))
    for number in order:
        optimizers[number].step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert_tensors_close([first.grad, second.grad], [g / norm for g in before])
    assert_tensors_close([first], [values[0] - 0.1 * before[0] / norm])
    assert_tensors_close([second], [values[1] - 0.3 * before[1] / norm])
    assert_within(steps)


# Steps at different times

SCHEDULES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "every third": lambda step: (0, 1) if step % 3 == 2 else (),
    "one half as often": lambda step: (0, 1) if step % 2 else (0,),
}
"""Which optimizers step after a backward pass; gradients are zeroed at their own steps."""


def matrix_and_rest() -> list[torch.optim.Optimizer]:
    first, second = weights()
    matrix = getattr(torch.optim, "Muon", torch.optim.SGD)  # since torch 2.9
    return [matrix([first], lr=0.02), torch.optim.AdamW([second], lr=0.02)]


@either_order
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [pair, matrix_and_rest])
def test_accumulated_gradients(make, set_to_none, schedule, order):
    """By hand, all that is new is clipped together, whoever is about to step."""
    twins, norms = Twins(make), []
    for step in range(12):
        factor = (0.05, 1.0, 10.0)[step % 3]
        joint_loss(step, twins.ours, factor).backward()
        joint_loss(step, twins.theirs, factor).backward()
        stepping = [number for number in order if number in SCHEDULES[schedule](step)]
        if not stepping:
            continue
        for number in stepping:
            twins.ours[number].step()
        norms.append(twins.take_by_hand(stepping, tolerance=1e-4))
        twins.zero_grad(stepping, set_to_none=set_to_none)
        assert twins.clipper.steps == len(norms)
    assert max(norms) > 1.5
    assert twins.clipper.clip_rate() == pytest.approx(sum(norm > 1 for norm in norms) / len(norms))
    twins.check(tolerance=1e-4)


@either_order
@pytest.mark.parametrize("set_to_none", [True, False])
def test_losses_with_backward_passes_of_their_own(set_to_none, order):
    """As a GAN's: each adds to the gradients of the other optimizer, which are new by that."""
    twins = Twins(pair)
    for step in range(8):
        for number in order:
            twins.zero_grad([number], set_to_none=set_to_none)
            for optimizers in (twins.ours, twins.theirs):
                own, other = (parameters_of(optimizers[n])[0] for n in (number, 1 - number))
                ((own * (step + 1)) ** 2 * (other**2).mean()).sum().backward()
            twins.ours[number].step()
            twins.take_by_hand([number])
    assert len(twins.steps) == twins.clipper.steps == 16
    twins.check()


class Writing(torch.optim.SGD):
    """An optimizer that adds its weight decay to the gradients themselves."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in parameters_of(self):
            parameter.grad += 10 * parameter
            parameter -= 0.1 * parameter.grad


def test_gradients_that_a_step_has_written_are_not_new():
    first, second = weights()
    optimizers = [Writing([first]), torch.optim.SGD([second], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    (first**2).sum().backward()
    optimizers[0].step()
    assert joint_norm(optimizers[0]) > 10
    (second**2).sum().backward()
    norm = joint_norm(optimizers[1])
    optimizers[1].step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert joint_norm(optimizers[1]) == pytest.approx(1.0, rel=1e-6)
    assert joint_norm(optimizers[0]) > 10


def test_gradients_computed_assigned_or_written_by_hand_are_new():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    steps = watch(*optimizers)
    joint_loss(0, optimizers).backward()
    optimizers[0].step()
    for number in (1, 1, 0, 1, 0, 0):
        joint_loss(number, optimizers, 50.0).backward()
        optimizers[number].step()
    assert clipper.steps == 7
    [weight] = parameters_of(optimizers[1])
    weight.grad = torch.full_like(weight, 30.0)
    optimizers[1].step()
    weight.grad.mul_(50.0)
    optimizers[1].step()
    weight.grad.copy_(torch.full_like(weight, 70.0))
    optimizers[1].step()
    assert_within(steps)
    assert clipper.steps == 10
    assert clipper.last.norm.item() == pytest.approx(70 * math.sqrt(6), rel=1e-6)


def test_gradients_written_without_a_trace():
    """What moves no version counter is clipped at every step all the same."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in weights]
    GradientClipper(optimizers, 1.0)
    for weight in weights:
        weight.grad = torch.empty(2)
    for _ in range(3):
        for weight in weights:
            weight.grad.data.fill_(3.0)
        for optimizer, weight in zip(optimizers, weights, strict=True):
            optimizer.step()
            assert weight.grad.norm().item() <= LIMIT


# Skips


def states_of(*optimizers: torch.optim.Optimizer) -> list[Any]:
    return [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        for optimizer in optimizers
        for state in optimizer.state.values()
    ]


POLICIES = [{"exceed": "skip"}, {"nonfinite": "skip"}, {"nonfinite": "raise"}]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
@either_order
@fused_or_not
def test_a_skip_skips_all_and_counts_once(fused, order, steps_before, policy, route):
    optimizers, held = mixed(fused), []
    clipper = GradientClipper(optimizers, 50.0, **policy)

    def take(step: int, factor: float = 3.0) -> None:
        clipper.zero_grad()
        joint_loss(step, optimizers, factor).backward()
        if factor > 3 and "nonfinite" in policy:
            parameters_of(optimizers[1])[0].grad[0, 0] = math.nan
        held[:] = [p.grad for p in parameters_of(*optimizers)], gradients_of(*optimizers)
        for number in order:
            raises = policy == POLICIES[2] and factor > 3 and number == order[0]
            with pytest.raises(NonFiniteGradientError) if raises else nullcontext():
                optimizers[number].step()

    for step in range(steps_before):
        take(step)
    before, states = joint_values(*optimizers), states_of(*optimizers)
    take(9, 3000.0)
    torch.testing.assert_close(joint_values(*optimizers), before, rtol=0, atol=0)
    torch.testing.assert_close(states_of(*optimizers), states, rtol=0, atol=0)
    gradients, copies = [p.grad for p in parameters_of(*optimizers)], held[1]
    assert all(one is other for one, other in zip(gradients, held[0], strict=True))
    torch.testing.assert_close(gradients, copies, rtol=0, atol=0, equal_nan=True)
    assert (clipper.steps, clipper.skipped) == (steps_before + 1, 1)
    assert not has_marks(*optimizers)
    take(3)
    assert not any(map(torch.equal, joint_values(*optimizers), before))
    assert (clipper.steps, clipper.skipped) == (steps_before + 2, 1)


def test_an_error_is_raised_again():
    """A step that raised was not taken: the same gradients raise again."""
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0, nonfinite="raise")
    joint_loss(0, optimizers, math.nan).backward()
    for _ in range(2):
        with pytest.raises(NonFiniteGradientError):
            optimizers[0].step()
    assert clipper.steps == 2


class FailingSGD(torch.optim.SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise OSError("device lost")
        return super().step(closure)


def test_a_step_that_raised_is_counted_with_the_next_of_its_round():
    first, second = weights()
    optimizers = [FailingSGD([first], lr=0.1), torch.optim.SGD([second], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    joint_loss(0, optimizers).backward()
    norm = joint_norm(*optimizers)
    with pytest.raises(OSError, match="device lost"):
        optimizers[0].step()
    optimizers[1].step()
    optimizers[0].fails = False
    optimizers[0].step()
    assert joint_norm(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert clipper.steps == 1


def test_one_record_where_no_optimizer_has_a_gradient():
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0) for _ in range(2)]
    clipper = GradientClipper(optimizers, 1.0)
    clipper.step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == 0.0


# Memory


@pytest.mark.parametrize("policy", [{}, {"exceed": "skip"}, {"exceed": "observe"}], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("stepping", [(0, 1), (0,), (1,)], ids=str)
@fused_or_not
def test_gradients_set_to_none_are_freed(fused, stepping, scaled, policy):
    optimizers = mixed(fused)
    scaler = joint_scaler(enabled=scaled)
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler, **policy)
    scaled_round(optimizers, scaler, stepping)
    references = [weakref.ref(p.grad) for p in parameters_of(*optimizers)]
    assert all(reference() is not None for reference in references)
    clipper.zero_grad()
    assert all(reference() is None for reference in references)
    assert clipper.steps == 1


def test_gradients_are_freed_after_a_step_that_raised():
    optimizers = pair()
    clipper = GradientClipper(optimizers, lambda step: 1 / step)
    joint_loss(0, optimizers).backward()
    references = [weakref.ref(p.grad) for p in parameters_of(*optimizers)]
    try:
        optimizers[0].step()
    except ZeroDivisionError:
        clipper.zero_grad()
    assert all(reference() is None for reference in references)
    assert clipper.steps == 0
