"""Several optimizers of one clipper: which gradients share a norm, and when they are clipped."""

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper, NonFiniteGradientError
from tests.support.reference import bits_in, gradient_norm
from tests.support.twins import (
    PlannedError,
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
    layers,
    layers_loss,
    mixed,
    pair,
    parameters_of,
    scaled_round,
    values_of,
    watch,
)


def three() -> list[torch.optim.Optimizer]:
    return [*pair(), torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)]


def both_hold_one() -> list[torch.optim.Optimizer]:
    first, second = layers()
    return [torch.optim.SGD([first, second], lr=0.1), torch.optim.SGD([second], lr=0.2)]


@pytest.mark.parametrize("make", [pair, three, both_hold_one])
@either_order
def test_one_norm(order, make):
    """All gradients are scaled by one factor, once, at the first step; one record is made."""
    twins = Twins(make)
    for optimizers in (twins.ours, twins.theirs):
        first, second, *rest = parameters_of(*optimizers)
        loss = layers_loss(0, (first, second), 5.0)
        (loss + sum((p**2).sum() for p in rest if make is three)).backward()
    order = (*order, 2)[: len(twins.ours)]
    for number in order:
        twins.ours[number].step()
        assert joint_norm(*twins.ours) == pytest.approx(1.0, rel=1e-6)
    assert twins.take_by_hand(tolerance=1e-9) > 2
    assert twins.clipper.steps == 1
    assert twins.clipper.last.clipped_norm.item() == pytest.approx(1.0)
    assert_tensors_close(gradients_of(*twins.ours), gradients_of(*twins.theirs))
    assert [number for number, _ in twins.steps] == list(order)
    twins.check()


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
    twins.backward()
    before = values_of(*twins.ours)
    with pytest.raises(ArgumentError, match=r"step\(\) was given a closure.* 2 optimizers"):
        twins.clipper.step(lambda: joint_loss(0, twins.ours))
    assert all(map(torch.equal, values_of(*twins.ours), before))
    assert twins.clipper.step() is None
    twins.take_by_hand()
    twins.check()
    twins.clipper.zero_grad(set_to_none=False)
    assert [p.grad.abs().max().item() for p in parameters_of(*twins.ours)] == [0.0, 0.0]
    twins.clipper.zero_grad()
    assert [p.grad for p in parameters_of(*twins.ours)] == [None, None]


def test_a_closure_of_one_optimizer():
    """It may compute the gradients of the others as well."""
    twins = Twins(pair)

    def closure() -> torch.Tensor:
        twins.zero_grad()
        twins.backward()
        return torch.tensor(7.0)

    assert twins.ours[0].step(closure) == 7.0
    twins.ours[1].step()
    twins.take_by_hand(tolerance=1e-9)
    assert twins.clipper.steps == 1
    assert joint_norm(*twins.ours) == pytest.approx(1.0, rel=1e-6)


@either_order
def test_a_group_with_its_own_max_norm(order):
    first, second = layers()
    alone = nn.Parameter(torch.ones(3))
    optimizers = [
        torch.optim.SGD([{"params": [first]}, {"params": [alone], "max_norm": 0.5}], lr=0.1),
        torch.optim.SGD([second], lr=0.1),
    ]
    clipper = GradientClipper(optimizers, 1.0)
    (layers_loss(0, (first, second), 5.0) + (alone**2).sum()).backward()
    norms = [gradient_norm([first, second]), gradient_norm([alone])]
    for number in order:
        optimizers[number].step()
    assert clipper.labels == ("global", "optimizer 0, group 1")
    assert clipper.last.norm.tolist() == pytest.approx(norms, rel=1e-6)
    assert gradient_norm([alone]) == pytest.approx(0.5, rel=1e-6)
    assert gradient_norm([first, second]) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


SCHEDULES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "every third": lambda step: (0, 1) if step % 3 == 2 else (),
    "one half as often": lambda step: (0, 1) if step % 2 else (0,),
}
"""Which optimizers step after a backward pass; gradients are zeroed at their own steps."""


def matrix_and_rest() -> list[torch.optim.Optimizer]:
    first, second = layers()
    matrix = getattr(torch.optim, "Muon", torch.optim.SGD)  # since torch 2.9
    return [matrix([first], lr=0.02), torch.optim.AdamW([second], lr=0.02)]


@pytest.mark.filterwarnings("ignore:Muon shares a norm")
@either_order
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [pair, matrix_and_rest])
def test_accumulated_gradients(make, set_to_none, schedule, order):
    """By hand, all that is new is clipped together, whoever is about to step."""
    twins, norms = Twins(make), []
    for step in range(12):
        factor = (0.05, 1.0, 10.0)[step % 3]
        twins.backward(step, factor)
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
    first, second = layers()
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
    """Those that move no version counter are clipped at every step all the same."""
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
    assert clipper.steps == 10
    assert clipper.last.norm.item() == pytest.approx(70 * math.sqrt(weight.numel()), rel=1e-6)
    for parameter in parameters_of(*optimizers):
        parameter.grad = torch.empty_like(parameter)
    for _ in range(3):
        for parameter in parameters_of(*optimizers):
            parameter.grad.data.fill_(3.0)
        for optimizer in optimizers:
            optimizer.step()
    assert_within(steps)


POLICIES = [{"exceed": "skip"}, {"nonfinite": "skip"}, {"nonfinite": "raise"}]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
@either_order
@fused_or_not
def test_a_skip_skips_all_and_counts_once(fused, order, steps_before, policy, route):
    optimizers = mixed(fused)
    clipper = GradientClipper(optimizers, 50.0, **policy)

    def everything() -> Any:
        gradients = [p.grad for p in parameters_of(*optimizers)]
        states = [optimizer.state_dict()["state"] for optimizer in optimizers]
        return [*map(id, gradients)], bits_in([values_of(*optimizers), gradients, states])

    def take(step: int, factor: float = 5.0) -> tuple[Any, Any]:
        """Return all that there is before the steps and after."""
        clipper.zero_grad()
        joint_loss(step, optimizers, factor).backward()
        if factor > 5 and "nonfinite" in policy:
            parameters_of(optimizers[1])[0].grad[0, 0] = math.nan
        before = everything()
        for number in order:
            raises = policy == POLICIES[2] and factor > 5 and number == order[0]
            with pytest.raises(NonFiniteGradientError) if raises else nullcontext():
                optimizers[number].step()
        return before, everything()

    for step in range(steps_before):
        take(step)
    before, after = take(9, 3000.0)
    assert after == before
    assert (clipper.steps, clipper.skipped) == (steps_before + 1, 1)
    assert not has_marks(*optimizers)
    values = values_of(*optimizers)
    take(3)
    assert not any(map(torch.equal, values_of(*optimizers), values))
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
            raise PlannedError
        return super().step(closure)


def test_a_step_that_raised_is_counted_with_the_next_of_its_round():
    first, second = layers()
    optimizers = [FailingSGD([first], lr=0.1), torch.optim.SGD([second], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    joint_loss(0, optimizers).backward()
    norm = joint_norm(*optimizers)
    with pytest.raises(PlannedError):
        optimizers[0].step()
    optimizers[1].step()
    optimizers[0].fails = False
    optimizers[0].step()
    assert joint_norm(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert clipper.steps == 1


def test_one_record_where_no_optimizer_has_a_gradient():
    clipper = GradientClipper(pair(), 1.0)
    clipper.step()
    assert (clipper.steps, clipper.last.norm.item()) == (1, 0.0)


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
