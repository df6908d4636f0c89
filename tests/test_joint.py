from __future__ import annotations

import copy
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from gradclip import (
    ArgumentError,
    AttachError,
    GradientClipper,
    NonFiniteGradientError,
    Threshold,
)

LIMIT = 1.0 + 1e-6
MARKS = {"grad_scale", "found_inf"}

either_order = pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "reversed"])
fused_or_not = pytest.mark.parametrize(
    "fused", list(itertools.product([True, False], repeat=2)), ids=lambda f: f"fused {f[0]} {f[1]}"
)
scaling = pytest.mark.parametrize(
    ("unscale", "scaler_given"),
    [(False, True), (True, True), (True, False)],
    ids=["grad_scaler=", "grad_scaler= and unscale_", "unscale_"],
)


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def norm_of(*optimizers: torch.optim.Optimizer) -> float:
    """The norm of all gradients in float64, each tensor once."""
    gradients = {
        id(p.grad): p.grad.to_dense() if p.grad.is_sparse else p.grad
        for optimizer in optimizers
        for p in held(optimizer)
        if p.grad is not None
    }
    if not gradients:
        return 0.0
    flat = [gradient.double().flatten() for gradient in gradients.values()]
    return torch.linalg.vector_norm(torch.cat(flat)).item()


def values_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    return [p.detach().clone() for optimizer in optimizers for p in held(optimizer)]


def gradients_of(*optimizers: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.grad.clone() for optimizer in optimizers for p in held(optimizer)]


def scale_(factor: float, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for parameter in held(optimizer):
            parameter.grad *= factor


def watch(*optimizers: torch.optim.Optimizer) -> list[tuple[int, float]]:
    """Note number and norm of every step: hooks that see what the optimizer steps with."""
    seen: list[tuple[int, float]] = []
    for number, optimizer in enumerate(optimizers):
        optimizer.register_step_pre_hook(lambda o, *_, n=number: seen.append((n, norm_of(o))))
    return seen


def weights(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (3, 2)]]


def pair(
    make: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any
) -> list[torch.optim.Optimizer]:
    options = {"lr": 0.1, **options}
    return [make([weight], **options) for weight in weights()]


def mixed(fused: tuple[bool, bool]) -> list[torch.optim.Optimizer]:
    first, second = weights()
    return [
        torch.optim.Adam([first], lr=0.05, fused=fused[0]),
        torch.optim.SGD([second], lr=0.05, momentum=0.9, fused=fused[1]),
    ]


def loss_of(step: int, optimizers: Sequence[torch.optim.Optimizer], factor: float = 3.0):
    """A loss of two layers, one in each optimizer."""
    generator = torch.Generator().manual_seed(100 + step)
    inputs, targets = (torch.randn(6, width, generator=generator) for width in (4, 2))
    first, second = (held(optimizer)[0] for optimizer in optimizers)
    return ((torch.tanh(inputs @ first) @ second - targets) ** 2).mean() * factor


def scaler_of(**options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**12, "growth_interval": 2, **options})


def assert_within(seen: Sequence[tuple[int, float]]) -> None:
    assert seen
    for _, norm in seen:
        assert norm <= LIMIT


def assert_close(found: Sequence[torch.Tensor], needed: Sequence[torch.Tensor]) -> None:
    torch.testing.assert_close(list(found), list(needed), rtol=1e-5, atol=1e-6)


# One backward, several optimizers


@either_order
def test_two_optimizers_share_one_norm_and_one_factor(order):
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    loss_of(0, optimizers).backward()
    norm, before = norm_of(*optimizers), gradients_of(*optimizers)
    assert norm > 2
    seen = watch(*optimizers)
    values = values_of(optimizers)
    for number in order:
        optimizers[number].step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-9)
    assert clipper.last.clipped_norm.item() == pytest.approx(1.0)
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert_close(gradients_of(*optimizers), [g / norm for g in before])
    assert_close(
        values_of(optimizers), [v - 0.1 * g / norm for v, g in zip(values, before, strict=True)]
    )
    assert [number for number, _ in seen] == list(order)


def test_below_the_threshold_nothing_is_written_and_one_record_is_made():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1e3)
    loss_of(0, optimizers).backward()
    versions = [p.grad._version for o in optimizers for p in held(o)]
    clipper.step()
    assert [p.grad._version for o in optimizers for p in held(o)] == versions
    assert (clipper.steps, clipper.clip_rate()) == (1, 0.0)


MATRIX = [torch.optim.SGD, *([torch.optim.Muon] if hasattr(torch.optim, "Muon") else [])]


@pytest.mark.parametrize("matrix", MATRIX)
@either_order
def test_a_matrix_optimizer_and_adamw_train_as_with_clipping_by_hand(matrix, order):
    def build() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        rest = [p for p in model.parameters() if p.ndim == 1]
        matrices = [p for p in model.parameters() if p.ndim == 2]
        return model, [matrix(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.02)]

    model, optimizers = build()
    twin, others = build()
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    norms = []
    for step in range(12):
        torch.manual_seed(step)
        inputs, targets = torch.randn(8, 6), torch.randn(8, 2)
        factor = (0.05, 1.0, 40.0)[step % 3]
        for network in (model, twin):
            network.zero_grad()
            (((network(inputs) - targets) ** 2).mean() * factor).backward()
        for number in order:
            optimizers[number].step()
        norms.append(norm_of(*others))
        scale_(min(1.0, 1 / norms[-1]), *others)
        for number in order:
            others[number].step()
        assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-4)
    assert clipper.steps == 12
    assert clipper.clip_rate() == pytest.approx(sum(norm > 1 for norm in norms) / 12)
    assert 0 < clipper.clip_rate() < 1
    assert_within(seen)
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5
    )


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, sparse=True)
        self.output = nn.Linear(4, 3)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.SparseAdam(list(self.embedding.parameters()), lr=0.05),
            torch.optim.Adam(self.output.parameters(), lr=0.05),
        ]

    def loss(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        words = torch.randint(0, 6, (16,), generator=generator)  # most of them more than once
        factor = (0.3, 5.0, 20.0)[step % 3]
        return (self.output(self.embedding(words)) ** 2).sum(1).mean() * factor


@pytest.mark.parametrize("rounds", [1, 3], ids=["each", "accumulated"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "no scaler"])
@either_order
def test_sparse_and_dense_gradients_share_one_norm(order, scaled, rounds):
    torch.manual_seed(0)
    model = Words()
    twin = Words()
    twin.load_state_dict(model.state_dict())
    optimizers, others = model.optimizers(), twin.optimizers()
    scaler = scaler_of(enabled=scaled)
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    seen = watch(*optimizers)
    for step in range(12):
        scaler.scale(model.loss(step)).backward()
        twin.loss(step).backward()
        if step % rounds:
            continue
        for number in order:
            scaler.step(optimizers[number])
        scaler.update()
        norm = norm_of(*others)
        scale_(min(1.0, 1 / norm), *others)
        for optimizer in others:
            optimizer.step()
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-4)
        for optimizer in (clipper, *others):
            optimizer.zero_grad()
    assert clipper.steps == 12 // rounds
    assert clipper.clip_rate() > 0
    assert_within(seen)
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-4, atol=1e-5
    )


def test_step_and_zero_grad_of_the_clipper_reach_all_optimizers():
    optimizers, others = pair(), pair()
    clipper = GradientClipper(optimizers, 1.0)
    loss_of(0, optimizers).backward()
    loss_of(0, others).backward()
    assert clipper.step() is None
    scale_(1 / norm_of(*others), *others)
    for optimizer in others:
        optimizer.step()
    assert_close(values_of(optimizers), values_of(others))
    clipper.zero_grad(set_to_none=False)
    assert [p.grad.abs().max().item() for o in optimizers for p in held(o)] == [0.0, 0.0]
    clipper.zero_grad()
    assert [p.grad for o in optimizers for p in held(o)] == [None, None]


def test_a_closure_and_several_optimizers_is_refused():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    loss_of(0, optimizers).backward()
    before = values_of(optimizers)
    with pytest.raises(ArgumentError, match="step\\(\\) was given a closure.* 2 optimizers"):
        clipper.step(lambda: loss_of(0, optimizers))
    assert all(map(torch.equal, values_of(optimizers), before))
    assert clipper.steps == 0


def test_a_closure_given_to_one_of_the_optimizers_is_clipped():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    norms = []

    def closure() -> torch.Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(0, optimizers)
        loss.backward()
        norms.append(norm_of(*optimizers))
        return loss

    optimizers[0].step(closure)
    optimizers[1].step()
    assert len(norms) == 1
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norms[0], rel=1e-9)
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("given", [lambda a, b: [a, a], lambda a, b: [a, b, a]])
def test_one_optimizer_given_twice_is_refused(given):
    optimizers = pair()
    with pytest.raises(AttachError, match="The same SGD was given twice"):
        GradientClipper(given(*optimizers), 1.0)
    GradientClipper(optimizers, 1.0)  # nothing was attached


@either_order
def test_three_optimizers_share_one_norm(order):
    optimizers = [*pair(), torch.optim.Adagrad([nn.Parameter(torch.ones(3))], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    (loss_of(0, optimizers[:2]) + (held(optimizers[2])[0] ** 2).sum()).backward()
    norm = norm_of(*optimizers)
    for optimizer in optimizers[:: 1 if order[0] == 0 else -1]:
        optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-9)
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


@either_order
def test_a_group_with_its_own_max_norm_is_not_in_the_joint_norm(order):
    first, second = weights()
    alone = nn.Parameter(torch.ones(3))
    optimizers = [
        torch.optim.SGD([{"params": [first]}, {"params": [alone], "max_norm": 0.5}], lr=0.1),
        torch.optim.SGD([second], lr=0.1),
    ]
    clipper = GradientClipper(optimizers, 1.0)
    (loss_of(0, optimizers) + (alone**2).sum()).backward()
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
def test_a_parameter_that_both_hold_counts_and_is_scaled_once(order):
    first, second = weights()
    optimizers = [torch.optim.SGD([first, second], lr=0.1), torch.optim.SGD([second], lr=0.2)]
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    values = [first.detach().clone(), second.detach().clone()]
    loss_of(0, [torch.optim.SGD([w]) for w in (first, second)]).backward()
    before = [first.grad.clone(), second.grad.clone()]
    norm = math.hypot(*(g.norm().item() for g in before))
    for number in order:
        optimizers[number].step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert_close([first.grad, second.grad], [g / norm for g in before])
    assert_close([first], [values[0] - 0.1 * before[0] / norm])
    assert_close([second], [values[1] - 0.3 * before[1] / norm])
    assert_within(seen)


# Steps at different times


@either_order
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_are_clipped_once_at_the_steps(order, set_to_none):
    optimizers, others = (pair(torch.optim.SGD, momentum=0.9) for _ in range(2))
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    for step in range(12):
        loss_of(step, optimizers).backward()
        loss_of(step, others).backward()
        if step % 3 < 2:
            continue
        for number in order:
            optimizers[number].step()
        norm = norm_of(*others)
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
        scale_(min(1.0, 1 / norm), *others)
        for optimizer in (*others, clipper):
            if optimizer is not clipper:
                optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert clipper.steps == 4
    assert_close(values_of(optimizers), values_of(others))
    assert_within(seen)


@pytest.mark.parametrize("set_to_none", [True, False])
@either_order
def test_one_that_steps_half_as_often_keeps_what_it_has_accumulated(order, set_to_none):
    # The first steps at every iteration, the second at every other one, both zeroed at its steps.
    optimizers, others = pair(), pair()
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    norms = []
    for step in range(10):
        loss_of(step, optimizers).backward()
        stepping = [number for number in order if number == 0 or step % 2]
        for number in stepping:
            optimizers[number].step()
        # By hand: all that is new is clipped together, whoever is about to step.
        loss_of(step, others).backward()
        norms.append(norm_of(*others))
        scale_(min(1.0, 1 / norms[-1]), *others)
        for number in stepping:
            others[number].step()
        for number in stepping:
            optimizers[number].zero_grad(set_to_none=set_to_none)
            others[number].zero_grad(set_to_none=set_to_none)
        assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-5)
        assert clipper.steps == step + 1
    assert max(norms) > 1.5
    assert len(seen) == 15
    assert_within(seen)
    assert_close(values_of(optimizers), values_of(others))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_two_losses_with_backwards_of_their_own_are_clipped_each_alone(set_to_none):
    optimizers, others = pair(), pair()
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    for step in range(8):
        for optimizer, other in zip(optimizers, others, strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            other.zero_grad(set_to_none=set_to_none)
            for each in (optimizer, other):
                ((held(each)[0] * (step + 1)) ** 2).sum().backward()
            norm = norm_of(other)
            scale_(min(1.0, 1 / norm), other)
            optimizer.step()
            other.step()
            assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
    assert clipper.steps == 16
    assert_within(seen)
    assert_close(values_of(optimizers), values_of(others))


class Writing(torch.optim.SGD):
    """An optimizer that adds its weight decay to the gradients themselves."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in held(self):
            parameter.grad += 10 * parameter
            parameter -= 0.1 * parameter.grad


def test_gradients_that_a_step_has_written_are_not_new():
    first, second = weights()
    optimizers = [Writing([first]), torch.optim.SGD([second], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    (first**2).sum().backward()
    optimizers[0].step()
    assert norm_of(optimizers[0]) > 10
    (second**2).sum().backward()
    norm = norm_of(optimizers[1])
    optimizers[1].step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert norm_of(optimizers[1]) == pytest.approx(1.0, rel=1e-6)
    assert norm_of(optimizers[0]) > 10


def test_a_step_repeated_with_new_gradients_is_clipped_anew():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    loss_of(0, optimizers).backward()
    optimizers[0].step()
    for number in (1, 1, 0, 1, 0, 0):
        loss_of(number, optimizers, 50.0).backward()
        optimizers[number].step()
    assert_within(seen)
    assert clipper.steps == 7
    assert all(norm == pytest.approx(1.0, abs=0.5) or norm < 1 for _, norm in seen)


def test_gradients_assigned_or_written_by_hand_are_new():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    seen = watch(*optimizers)
    loss_of(0, optimizers).backward()
    clipper.step()
    weight = held(optimizers[1])[0]
    weight.grad = torch.full_like(weight, 30.0)
    optimizers[1].step()
    weight.grad.mul_(50.0)
    optimizers[1].step()
    weight.grad.copy_(torch.full_like(weight, 70.0))
    optimizers[1].step()
    assert_within(seen)
    assert clipper.steps == 4
    assert clipper.last.norm.item() == pytest.approx(70 * math.sqrt(6), rel=1e-6)


class Gan:
    """Weights, optimizers and losses of a generator and a discriminator."""

    def __init__(self) -> None:
        self.generator, self.discriminator = weights()
        self.optimizers = [
            torch.optim.SGD([self.generator], lr=0.05, momentum=0.5),
            torch.optim.SGD([self.discriminator], lr=0.05, momentum=0.5),
        ]

    def fake(self, step: int) -> torch.Tensor:
        noise = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return torch.tanh(noise @ self.generator)

    def discriminator_loss(self, step: int) -> torch.Tensor:
        real = torch.randn(8, 3, generator=torch.Generator().manual_seed(50 + step))
        fake = self.fake(step).detach()
        return (
            40 * (((real @ self.discriminator - 1) ** 2) + (fake @ self.discriminator) ** 2).mean()
        )

    def generator_loss(self, step: int) -> torch.Tensor:
        return 200 * ((self.fake(step) @ self.discriminator - 1) ** 2).mean()

    def train(
        self,
        step: int,
        before_step: Callable[[torch.optim.Optimizer], None],
        *,
        set_to_none: bool,
        generator_first: bool,
    ) -> None:
        rounds = [
            (self.optimizers[1], self.discriminator_loss),
            (self.optimizers[0], self.generator_loss),
        ]
        for optimizer, loss in rounds[:: -1 if generator_first else 1]:
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(step).backward()
            before_step(optimizer)
            optimizer.step()


@pytest.mark.parametrize("generator_first", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gan_with_two_clippers_trains_as_with_clipping_by_hand(set_to_none, generator_first):
    options = {"set_to_none": set_to_none, "generator_first": generator_first}
    gan, twin = Gan(), Gan()
    clippers = [GradientClipper(optimizer, 1.0) for optimizer in gan.optimizers]
    seen = watch(*gan.optimizers)
    for step in range(10):
        gan.train(step, lambda _: None, **options)
        twin.train(step, lambda o: scale_(min(1.0, 1 / norm_of(o)), o), **options)
    assert [clipper.steps for clipper in clippers] == [10, 10]
    assert_within(seen)
    assert len(seen) == 20
    assert all(clipper.clip_rate() > 0 for clipper in clippers)
    assert_close(values_of(gan.optimizers), values_of(twin.optimizers))


@pytest.mark.parametrize("generator_first", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gan_with_one_joint_clipper_never_steps_above_the_threshold(set_to_none, generator_first):
    options = {"set_to_none": set_to_none, "generator_first": generator_first}
    gan = Gan()
    clipper = GradientClipper(gan.optimizers, 1.0)
    seen = watch(*gan.optimizers)
    unclipped = []
    for step in range(10):
        gan.train(step, lambda o: unclipped.append(norm_of(o)), **options)
    assert max(unclipped) > 20
    assert len(seen) == 20
    assert_within(seen)
    assert clipper.steps == 20


@pytest.mark.parametrize("generator_first", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("updates", [1, 2])
@fused_or_not
def test_a_gan_with_one_joint_clipper_and_a_scaler_is_right_or_refused(
    fused, updates, set_to_none, generator_first
):
    # With one update a round, GradScaler takes what was computed anew for unscaled; after zeroing
    # in place nobody can tell what was computed anew from what was added.
    gan = Gan()
    gan.optimizers = mixed(fused)
    gan.generator, gan.discriminator = (held(o)[0] for o in gan.optimizers)
    scaler = scaler_of()
    clipper = GradientClipper(gan.optimizers, 1.0, grad_scaler=scaler)
    seen = watch(*gan.optimizers)
    rounds = [(gan.optimizers[1], gan.discriminator_loss), (gan.optimizers[0], gan.generator_loss)]
    refused = []
    for step in range(4):
        for optimizer, loss in rounds[:: -1 if generator_first else 1]:
            optimizer.zero_grad(set_to_none=set_to_none)
            scaler.scale(loss(step)).backward()
            try:
                scaler.step(optimizer)
            except AttachError as error:
                refused.append(str(error))
                break
            if updates == 2:
                scaler.update()
            assert clipper.last.norm.item() < 3000
        if refused:
            break
        if updates == 1:
            scaler.update()
    assert all("scale" in message for message in refused)
    assert not (refused and updates == 2 and set_to_none)
    assert_within(seen)


# GradScaler


def scaled_round(
    optimizers: Sequence[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    order: Sequence[int],
    *,
    step: int = 0,
    unscale: bool = False,
    overflow: int | None = None,
) -> None:
    """One iteration under a GradScaler, without its update."""
    scaler.scale(loss_of(step, optimizers)).backward()
    if overflow is not None:
        held(optimizers[overflow])[0].grad[0, 0] = math.inf
    if unscale:
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
    for number in order:
        scaler.step(optimizers[number])
        assert not MARKS & set(vars(optimizers[number]))


@scaling
@either_order
@fused_or_not
def test_under_a_scaler_both_are_clipped_by_their_true_joint_norm(
    fused, order, unscale, scaler_given
):
    optimizers, others = mixed(fused), mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler if scaler_given else None)
    seen = watch(*optimizers)
    scales = []
    for step in range(10):
        overflows = step in (3, 6)
        for each in (*optimizers, *others):
            each.zero_grad()
        scaler.scale(loss_of(step, optimizers) * (math.inf if overflows else 1)).backward()
        if unscale:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        for number in order:
            scaler.step(optimizers[number])
            assert not MARKS & set(vars(optimizers[number]))
        scales.append(scaler.get_scale())
        scaler.update()
        if overflows:
            continue
        loss_of(step, others).backward()
        norm = norm_of(*others)
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
        scale_(min(1.0, 1 / norm), *others)
        for other in others:
            other.step()
    assert clipper.steps == 8
    assert len(seen) >= 16  # a fused one is called for an overflow, too
    assert all(norm <= LIMIT for _, norm in seen if math.isfinite(norm))
    assert {0.5, 2.0} <= {b / a for a, b in itertools.pairwise(scales)}
    assert_close(values_of(optimizers), values_of(others))


@scaling
@pytest.mark.parametrize("overflow", [0, 1])
@either_order
@fused_or_not
@pytest.mark.parametrize("nonfinite", ["zero", "raise"])
def test_an_overflow_in_one_leaves_it_out_and_the_other_is_clipped_alone(
    nonfinite, fused, order, overflow, unscale, scaler_given
):
    optimizers = mixed(fused)
    good = optimizers[1 - overflow]
    scaler = scaler_of()
    clipper = GradientClipper(
        optimizers, 1.0, nonfinite=nonfinite, grad_scaler=scaler if scaler_given else None
    )
    scaled_round(optimizers, scaler, order, unscale=unscale)  # makes the state
    scaler.update()
    clipper.zero_grad()
    before = values_of(optimizers)
    twins = mixed(fused)
    for mine, twin in zip(optimizers, twins, strict=True):
        held(twin)[0].data.copy_(held(mine)[0].data)
        twin.load_state_dict(copy.deepcopy(mine.state_dict()))
    loss_of(1, twins).backward()
    needed = norm_of(twins[1 - overflow])
    assert needed > 1.2
    scaled_round(optimizers, scaler, order, step=1, unscale=unscale, overflow=overflow)
    scaler.update()
    scale_(1 / needed, twins[1 - overflow])
    twins[1 - overflow].step()
    assert norm_of(good) == pytest.approx(1.0, rel=1e-6)
    assert_close([held(good)[0]], [held(twins[1 - overflow])[0]])
    assert torch.equal(held(optimizers[overflow])[0], before[overflow])
    assert clipper.steps == 2
    assert clipper.last.norm.item() == pytest.approx(needed, rel=1e-5)
    clipper.zero_grad()
    scaled_round(optimizers, scaler, order, step=2, unscale=unscale)
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 3
    assert clipper.skipped == 0


@pytest.mark.parametrize("overflow", [0, 1])
@either_order
@fused_or_not
def test_on_the_device_route_an_overflow_in_one_lets_the_other_be_clipped(
    fused, order, overflow, monkeypatch
):
    for module in ("optimizers.joint", "gradients.step"):
        monkeypatch.setattr(f"gradclip.{module}.host_may_read", lambda _: False)
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaled_round(optimizers, scaler, order)
    scaler.update()
    clipper.zero_grad()
    before = values_of(optimizers)
    scaled_round(optimizers, scaler, order, step=1, overflow=overflow)
    assert norm_of(optimizers[1 - overflow]) == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(held(optimizers[overflow])[0], before[overflow])
    assert not torch.equal(held(optimizers[1 - overflow])[0], before[1 - overflow])
    assert clipper.steps == 2
    assert clipper.skipped == 0
    assert clipper.state_dict()["counters"]["nonfinite_steps"] == 0


class Learning(Threshold):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def thresholds(self, norms, context):
        return torch.full_like(norms, 1.0)

    def observe(self, norms, clipped_norms, context):
        if context.present:
            self.seen.append(norms.item())


@pytest.mark.parametrize("overflow", [0, 1])
@either_order
@fused_or_not
def test_a_threshold_learns_nothing_from_the_norm_of_a_part(fused, order, overflow):
    rule = Learning()
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, rule, grad_scaler=scaler)
    whole = []
    for step in range(4):
        clipper.zero_grad()
        at_overflow = step in (1, 2)
        scaled_round(
            optimizers, scaler, order, step=step, overflow=overflow if at_overflow else None
        )
        scaler.update()
        if not at_overflow:
            whole.append(clipper.last.norm.item())
    assert rule.seen == whole
    assert clipper.steps == 4


@either_order
@fused_or_not
def test_scales_that_differ_are_refused_and_nothing_is_stepped(fused, order):
    optimizers = mixed(fused)
    clipper = GradientClipper(optimizers, 1.0)
    scaler = scaler_of()
    before = values_of(optimizers)
    with pytest.raises(AttachError, match="scales differ: give the clipper grad_scaler="):
        scaled_round(optimizers, scaler, order)
    assert all(map(torch.equal, values_of(optimizers), before))
    assert clipper.steps == 0
    assert all(not MARKS & set(vars(optimizer)) for optimizer in optimizers)


@either_order
@fused_or_not
def test_only_one_of_them_unscaled_is_refused_too(fused, order):
    optimizers = mixed(fused)
    GradientClipper(optimizers, 1.0)
    scaler = scaler_of()
    before = values_of(optimizers)
    scaler.scale(loss_of(0, optimizers)).backward()
    scaler.unscale_(optimizers[order[0]])
    with pytest.raises(AttachError, match="grad_scaler="):
        scaler.step(optimizers[order[0]])
    assert all(map(torch.equal, values_of(optimizers), before))


@either_order
@fused_or_not
def test_with_the_scaler_given_one_of_them_may_be_unscaled_before(fused, order):
    optimizers, others = mixed(fused), mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaler.scale(loss_of(0, optimizers)).backward()
    loss_of(0, others).backward()
    for number in order:
        if number == 1:
            scaler.unscale_(optimizers[1]) if order == (1, 0) else None
        scaler.step(optimizers[number])
    assert clipper.last.norm.item() == pytest.approx(norm_of(*others), rel=1e-5)
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("found", [1.0, "auto", True, torch.amp.GradScaler, nn.Linear(1, 1)])
def test_what_is_no_scaler_is_refused(found):
    optimizers = pair()
    with pytest.raises(ArgumentError, match="grad_scaler is a .*give the torch.amp.GradScaler"):
        GradientClipper(optimizers, 1.0, grad_scaler=found)
    GradientClipper(optimizers, 1.0)  # nothing was attached


@either_order
@fused_or_not
def test_a_direct_step_with_scaled_gradients_is_refused(fused, order):
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    before = values_of(optimizers)
    scaler.scale(loss_of(0, optimizers)).backward()
    gradients = gradients_of(*optimizers)
    with pytest.raises(AttachError, match="still scaled by grad_scaler: call grad_scaler.step"):
        optimizers[order[0]].step()
    assert all(map(torch.equal, values_of(optimizers), before))
    assert all(map(torch.equal, gradients_of(*optimizers), gradients))
    for number in order:  # the remedy that the error names
        scaler.step(optimizers[number])
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


@either_order
@fused_or_not
def test_direct_steps_after_unscaling_by_hand_are_clipped(fused, order):
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaler.scale(loss_of(0, optimizers)).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    for number in order:
        optimizers[number].step()
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1


@fused_or_not
def test_a_disabled_scaler_changes_nothing(fused):
    optimizers, others = mixed(fused), mixed(fused)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    for step in range(4):
        clipper.zero_grad()
        scaled_round(optimizers, scaler, (0, 1), step=step)
        scaler.update()
        for other in others:
            other.zero_grad()
        loss_of(step, others).backward()
        scale_(min(1.0, 1 / norm_of(*others)), *others)
        for other in others:
            other.step()
    assert clipper.steps == 4
    assert_close(values_of(optimizers), values_of(others))


def test_one_optimizer_may_be_given_its_scaler():
    [optimizer, _] = optimizers = mixed((True, True))
    scaler = scaler_of()
    clipper = GradientClipper(optimizer, 1.0, grad_scaler=scaler)
    scaler.scale(loss_of(0, optimizers, 30.0)).backward()
    norm = norm_of(optimizer) / scaler.get_scale()
    scaler.step(optimizer)
    assert norm > 1
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert norm_of(optimizer) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("first", [0, 1], ids=["stepped one first", "other one first"])
@pytest.mark.parametrize("again", [True, False], ids=["unscale_", "step"])
@fused_or_not
def test_gradients_added_to_those_of_another_scale_are_refused(fused, again, first):
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaler.scale(loss_of(0, optimizers)).backward()
    scaler.step(optimizers[0])  # unscales both
    scaler.update()
    optimizers[0].zero_grad()
    before = values_of(optimizers)
    scaler.scale(loss_of(1, optimizers)).backward()
    if again:
        scaler.unscale_(optimizers[first])
    with pytest.raises(AttachError, match="another scale"):
        scaler.step(optimizers[first])
    assert all(map(torch.equal, values_of(optimizers), before))
    assert clipper.steps == 1


@fused_or_not
def test_a_parameter_that_both_hold_is_not_unscaled_twice_in_silence(fused):
    first, second = weights()
    optimizers = [
        torch.optim.Adam([first, second], lr=0.05, fused=fused[0]),
        torch.optim.SGD([second], lr=0.05, fused=fused[1]),
    ]
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    loss = (first**2).sum() + (second**2).sum()
    scaler.scale(loss).backward()
    norm = 2 * math.sqrt(loss.item())
    before = values_of(optimizers)
    try:
        for optimizer in optimizers:
            scaler.step(optimizer)
    except AttachError:
        assert all(map(torch.equal, values_of(optimizers), before))
    else:
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("kept", [True, False], ids=["accumulated", "set to None"])
@either_order
@fused_or_not
def test_one_left_out_for_its_overflow_or_without_gradients_is_not_refused(fused, order, kept):
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaled_round(optimizers, scaler, order)
    scaler.update()
    clipper.zero_grad()
    scaled_round(optimizers, scaler, order, step=1, overflow=1)
    scaler.update()
    seen = watch(*optimizers)
    for step in range(2, 5):
        optimizers[0].zero_grad()
        if not kept:
            optimizers[1].zero_grad()
        scaled_round(optimizers, scaler, order, step=step)
        scaler.update()
        assert norm_of(optimizers[0]) <= LIMIT
    assert all(norm <= LIMIT for _, norm in seen if math.isfinite(norm))
    assert clipper.steps == 5
    assert math.isfinite(norm_of(optimizers[1])) is not kept


@pytest.mark.parametrize("set_to_none", [True, False])
@fused_or_not
def test_one_that_is_not_stepped_may_be_zeroed_before_the_update(fused, set_to_none):
    optimizers = mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    scaler.scale(loss_of(0, optimizers)).backward()
    scaler.step(optimizers[0])
    scaler.update()
    clipper.zero_grad(set_to_none=True)
    scaled_round(optimizers, scaler, (0, 1), step=1)
    assert clipper.steps == 2
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)


@either_order
@fused_or_not
def test_under_a_scaler_accumulated_gradients_have_their_true_norm(fused, order):
    optimizers, others = mixed(fused), mixed(fused)
    scaler = scaler_of(growth_interval=1)
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler)
    for step in range(9):
        scaler.scale(loss_of(step, optimizers)).backward()
        loss_of(step, others).backward()
        if step % 3 < 2:
            continue
        for number in order:
            scaler.step(optimizers[number])
        scaler.update()
        norm = norm_of(*others)
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
        scale_(min(1.0, 1 / norm), *others)
        for other in others:
            other.step()
        for each in (*optimizers, *others):
            each.zero_grad()
    assert clipper.steps == 3
    assert_close(values_of(optimizers), values_of(others))


class PlannedError(Exception):
    """What a hook or a function raises here."""


@pytest.mark.parametrize("ours", [True, False], ids=["max_norm raises", "a hook raises"])
@scaling
@either_order
@fused_or_not
def test_a_round_that_raised_leaves_no_trace(fused, order, unscale, scaler_given, ours):
    broken, overflows = (1, 4, 5, 8), (2, 6)
    now = 0

    def fail(*_: object) -> None:
        if now in broken:
            raise PlannedError

    optimizers, others = mixed(fused), mixed(fused)
    scaler = scaler_of()
    clipper = GradientClipper(
        optimizers,
        (lambda _: fail() or 1.0) if ours else 1.0,
        grad_scaler=scaler if scaler_given else None,
    )
    seen = watch(*optimizers)
    if not ours:
        optimizers[order[0]].register_step_pre_hook(fail)
    for now in range(11):
        clipper.zero_grad()
        scaler.scale(loss_of(now, optimizers) * (math.inf if now in overflows else 1)).backward()
        if unscale:
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
        try:
            for number in order:
                scaler.step(optimizers[number])
        except PlannedError:
            assert now in broken
        else:
            assert now not in broken
            assert all(not MARKS & set(vars(optimizer)) for optimizer in optimizers)
        if ours:
            assert all(not MARKS & set(vars(optimizer)) for optimizer in optimizers)
        scaler.update()
        if now in (*broken, *overflows):
            continue
        for other in others:
            other.zero_grad()
        loss_of(now, others).backward()
        norm = norm_of(*others)
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
        scale_(min(1.0, 1 / norm), *others)
        for other in others:
            other.step()
    assert clipper.steps == 5
    assert all(norm <= LIMIT for _, norm in seen if math.isfinite(norm))
    assert_close(values_of(optimizers), values_of(others))


# Skips


def states_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[Any]:
    return [
        {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for optimizer in optimizers
        for state in optimizer.state.values()
    ]


@pytest.mark.parametrize("device_route", [True, False])
@pytest.mark.parametrize("policy", [{"exceed": "skip"}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("steps_before", [0, 2])
@either_order
@fused_or_not
def test_a_skip_skips_all_and_counts_once(
    fused, order, steps_before, policy, device_route, monkeypatch
):
    if device_route:
        for module in ("optimizers.joint", "gradients.step"):
            monkeypatch.setattr(f"gradclip.{module}.host_may_read", lambda _: False)
    optimizers = mixed(fused)
    clipper = GradientClipper(optimizers, 50.0, **policy)
    for step in range(steps_before):
        clipper.zero_grad()
        loss_of(step, optimizers).backward()
        for number in order:
            optimizers[number].step()
    clipper.zero_grad()
    loss_of(9, optimizers, 3000.0).backward()
    if "nonfinite" in policy:
        held(optimizers[1])[0].grad[0, 0] = math.nan
    gradients = [p.grad for o in optimizers for p in held(o)]
    copies = gradients_of(*optimizers)
    before, states = values_of(optimizers), states_of(optimizers)
    for number in order:
        optimizers[number].step()
    torch.testing.assert_close(values_of(optimizers), before, rtol=0, atol=0)
    torch.testing.assert_close(states_of(optimizers), states, rtol=0, atol=0)
    found = [p.grad for o in optimizers for p in held(o)]
    assert all(one is other for one, other in zip(found, gradients, strict=True))
    torch.testing.assert_close(found, copies, rtol=0, atol=0, equal_nan=True)
    assert (clipper.steps, clipper.skipped) == (steps_before + 1, 1)
    assert all(not MARKS & set(vars(optimizer)) for optimizer in optimizers)
    clipper.zero_grad()
    loss_of(3, optimizers).backward()
    for number in order:
        optimizers[number].step()
    assert not any(map(torch.equal, values_of(optimizers), before))
    assert (clipper.steps, clipper.skipped) == (steps_before + 2, 1)


@either_order
@fused_or_not
def test_raise_at_the_first_one_skips_the_second_too(fused, order):
    optimizers = mixed(fused)
    clipper = GradientClipper(optimizers, 1.0, nonfinite="raise")
    loss_of(0, optimizers).backward()
    clipper.step()
    clipper.zero_grad()
    loss_of(1, optimizers).backward()
    held(optimizers[0])[0].grad[0, 0] = math.inf
    before, states = values_of(optimizers), states_of(optimizers)
    gradients = gradients_of(*optimizers)
    with pytest.raises(NonFiniteGradientError, match="optimizer|group|parameter"):
        optimizers[order[0]].step()
    optimizers[order[1]].step()
    torch.testing.assert_close(values_of(optimizers), before, rtol=0, atol=0)
    torch.testing.assert_close(states_of(optimizers), states, rtol=0, atol=0)
    torch.testing.assert_close(gradients_of(*optimizers), gradients, rtol=0, atol=0)
    assert (clipper.steps, clipper.skipped) == (2, 1)


@either_order
@fused_or_not
def test_zero_erases_the_gradients_of_all(fused, order):
    optimizers = mixed(fused)
    clipper = GradientClipper(optimizers, 1.0)
    loss_of(0, optimizers).backward()
    held(optimizers[1])[0].grad[0, 0] = math.nan
    for number in order:
        optimizers[number].step()
    assert [g.abs().max().item() for g in gradients_of(*optimizers)] == [0.0, 0.0]
    assert (clipper.steps, clipper.skipped) == (1, 0)


@either_order
def test_max_value_bounds_the_gradients_of_all_once(order):
    optimizers, others = pair(), pair()
    clipper = GradientClipper(optimizers, 0.9, max_value=0.5)
    loss_of(0, optimizers, 20.0).backward()
    loss_of(0, others, 20.0).backward()
    norm = norm_of(*others)
    for other in others:
        held(other)[0].grad.clamp_(-0.5, 0.5)
    scale_(0.9 / norm_of(*others), *others)
    for number in order:
        optimizers[number].step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert clipper.last.clipped_norm.item() == pytest.approx(0.9, rel=1e-6)
    assert_close(gradients_of(*optimizers), gradients_of(*others))
    assert clipper.steps == 1


class Failing(torch.optim.SGD):
    fails = True

    def step(self, closure=None):
        if self.fails:
            raise OSError("device lost")
        return super().step(closure)


def test_a_step_that_raised_is_counted_with_the_next_of_its_round():
    first, second = weights()
    optimizers = [Failing([first], lr=0.1), torch.optim.SGD([second], lr=0.1)]
    clipper = GradientClipper(optimizers, 1.0)
    loss_of(0, optimizers).backward()
    norm = norm_of(*optimizers)
    with pytest.raises(OSError, match="device lost"):
        optimizers[0].step()
    optimizers[1].step()
    optimizers[0].fails = False
    optimizers[0].step()
    assert norm_of(*optimizers) == pytest.approx(1.0, rel=1e-6)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert clipper.steps == 1


# Memory


def freed(references: Sequence[weakref.ref]) -> bool:
    return all(reference() is None for reference in references)


@pytest.mark.parametrize("policy", [{}, {"exceed": "skip"}, {"exceed": "observe"}], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("stepping", [(0, 1), (0,), (1,)], ids=str)
@fused_or_not
def test_gradients_that_were_set_to_none_are_freed(fused, stepping, scaled, policy):
    optimizers = mixed(fused)
    scaler = scaler_of(enabled=scaled)
    clipper = GradientClipper(optimizers, 1.0, grad_scaler=scaler, **policy)
    scaled_round(optimizers, scaler, stepping)
    gradients = [p.grad for o in optimizers for p in held(o)]
    references = [weakref.ref(gradient) for gradient in gradients]
    assert not freed(references)
    del gradients
    clipper.zero_grad()
    assert freed(references)
    assert clipper.steps == 1


def test_gradients_are_freed_after_a_step_that_raised():
    optimizers = pair()
    clipper = GradientClipper(optimizers, lambda step: 1 / step)
    loss_of(0, optimizers).backward()
    references = [weakref.ref(p.grad) for o in optimizers for p in held(o)]
    try:
        optimizers[0].step()
    except ZeroDivisionError:
        clipper.zero_grad()
    assert freed(references)
    assert clipper.steps == 0


def test_what_is_remembered_does_not_grow():
    optimizers = pair()
    clipper = GradientClipper(optimizers, 1.0)
    for step in range(20):
        clipper.zero_grad()
        loss_of(step, optimizers).backward()
        clipper.step()
    assert len(clipper._joint._several._clipped._clippings) <= 4


def test_gradients_that_are_written_without_a_trace_are_clipped_at_every_step():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in (first, second)]
    GradientClipper(optimizers, 1.0)
    for weight in (first, second):
        weight.grad = torch.empty(2)
    for _ in range(3):
        for weight in (first, second):
            weight.grad.data.fill_(3.0)  # changes no version
        for optimizer, weight in zip(optimizers, (first, second), strict=True):
            optimizer.step()
            assert weight.grad.norm().item() <= 1 + 1e-6


def test_a_norm_that_raised_raises_again():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizers = [torch.optim.SGD([weight], lr=1.0) for weight in (first, second)]
    clipper = GradientClipper(optimizers, 1.0, nonfinite="raise")
    first.grad, second.grad = torch.full((2,), math.nan), torch.ones(2)
    for _ in range(2):
        with pytest.raises(NonFiniteGradientError):
            optimizers[0].step()
    assert clipper.steps == 2


def test_where_nobody_has_a_gradient_there_is_one_record_a_round():
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0) for _ in range(2)]
    clipper = GradientClipper(optimizers, 1.0)
    clipper.step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == 0.0
