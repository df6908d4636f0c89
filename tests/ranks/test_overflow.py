"""GradScaler on ranks that have different parameters: an overflow on one is one on all."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from gradclip import GradientClipper, Ranks

KINDS = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
    "fused": lambda named: torch.optim.Adam(named, lr=0.1, fused=True),
    "unfused": lambda named: torch.optim.Adam(named, lr=0.1, foreach=False),
}
SCALE = 1024.0


def rank_scaler(kind: type = torch.amp.GradScaler) -> Any:
    return kind("cpu", init_scale=SCALE)


def is_last() -> bool:
    return distributed.get_rank() == distributed.get_world_size() - 1


def optimizers_of(*sizes: int) -> tuple[list[nn.Parameter], list[torch.optim.Optimizer]]:
    """Return weights of these sizes, each with an optimizer, under names that no other rank has."""
    rank = distributed.get_rank()
    weights = [nn.Parameter(torch.zeros(size)) for size in sizes]
    return weights, [torch.optim.SGD([(f"{rank}.{i}", w)], lr=0.1) for i, w in enumerate(weights)]


def step_all(scaler: Any, optimizers: Sequence[torch.optim.Optimizer], loss: Tensor) -> None:
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()


def square_of(clipper: GradientClipper) -> float:
    """Return the square of the norm, which is the number of elements that are 1."""
    return round(clipper.last.norm.square().item(), 6)


def steps_scaled(kind: str, when: str) -> Any:
    """Take 4 steps; at the third the last rank overflows, and at the second has no gradient."""
    rank, last = distributed.get_rank(), is_last()
    weight = nn.Parameter(torch.zeros(2 + rank))
    optimizer, scaler = KINDS[kind]([(f"weight{rank}", weight)]), rank_scaler()
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    rows = []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale((weight * (math.inf if step == 2 and last else 1.0)).sum()).backward()
        if step == 1 and last:
            weight.grad = None
        if when == "unscaled before":
            scaler.unscale_(optimizer)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(weight.detach(), before)
        rows.append((clipper.steps, square_of(clipper), scaler.get_scale(), moved))
    clipper.detach()
    return rows, type(scaler) is torch.amp.GradScaler


@pytest.mark.parametrize("when", ["in the step", "unscaled before"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_optimizer(ranks, kind, when):
    """An overflow on one rank skips the step on all, and the scaler is itself again afterwards."""
    results = ranks.run(steps_scaled, kind, when)
    count = len(results)
    total = sum(2 + rank for rank in range(count))
    for rank, (rows, restored) in enumerate(results):
        steps, squares, scales, moved = zip(*rows, strict=True)
        assert restored
        assert steps == (1, 2, 2, 3)
        assert (*squares[:2], squares[3]) == (total, total - (2 + count - 1), total)
        assert scales == (SCALE, SCALE, SCALE / 2, SCALE / 2)
        assert moved == (True, rank != count - 1, False, True)


def joint(used: int, bad: dict[int, dict[int, float]]) -> Any:
    """Take 5 steps with two optimizers.

    Args:
        used: The optimizer that has gradients on rank 0; on rank 1 both have.
        bad: By step, the factors of losses on rank 1, by optimizer.
    """
    weights, optimizers = optimizers_of(2, 3)
    scaler, rows = rank_scaler(), []
    clipper = GradientClipper(optimizers, 0.5, ranks=Ranks(), grad_scaler=scaler)
    for step in range(5):
        clipper.zero_grad()
        both = {0: 1.0, 1: 1.0} | bad.get(step, {})
        factors = both if distributed.get_rank() else {used: 1.0}
        losses = [(weights[i] * factor).sum() for i, factor in factors.items()]
        step_all(scaler, optimizers, torch.stack(losses).sum())
        rows.append((clipper.steps, square_of(clipper)))
    return rows, scaler.get_scale()


@pytest.mark.parametrize("used", [0, 1])
def test_several_optimizers(two_ranks, used):
    """An overflow of one leaves its gradients out on all ranks; one of all skips the step."""
    sizes = (2, 3)
    both = sum(sizes) + sizes[used]
    # The overflow of the optimizer that rank 0 has leaves the other's gradients on rank 1.
    without = {used: sizes[1 - used], 1 - used: 2 * sizes[used]}
    rows = [*enumerate((both, without[0], without[1], both, both), 1)]
    results = two_ranks.run(joint, used, {1: {0: math.inf}, 2: {1: math.inf}})
    assert results == [(rows, SCALE / 4)] * 2

    rows = [(steps, both) for steps in (1, 1, 2, 3, 4)]
    results = two_ranks.run(joint, used, {1: {0: math.nan, 1: math.nan}})
    assert results == [(rows, SCALE / 2)] * 2


def nested() -> Any:
    """Two clippers with one scaler, of which the later one is detached first, or last."""
    scaler, rows = rank_scaler(), []
    for first in (0, 1):
        [weight, other], optimizers = optimizers_of(2, 2)
        options = {"ranks": Ranks(), "grad_scaler": scaler}
        clippers = [GradientClipper(each, 0.5, **options) for each in optimizers]
        clippers[first].detach()
        left = other if first == 0 else weight
        bad = math.inf if distributed.get_rank() else 1.0
        step_all(scaler, [optimizers[1 - first]], (left * bad).sum())
        clippers[1 - first].detach()
        rows.append((clippers[1 - first].steps, type(scaler) is torch.amp.GradScaler))
    return rows


def test_two_clippers_on_one_scaler(two_ranks):
    """They can be detached in any order, and the last gives the scaler its class back."""
    assert two_ranks.run(nested) == [[(0, True)] * 2] * 2


def unlike_rounds() -> Any:
    """Two optimizers, of which the second steps every other time, and is all that rank 1 has."""
    weights, optimizers = optimizers_of(2, 3)
    clipper = GradientClipper(optimizers, None, ranks=Ranks())
    squares = []
    for step in range(4):
        (weights[distributed.get_rank()] * (step + 1.0)).sum().backward()
        for optimizer in optimizers[: 1 + step % 2]:
            optimizer.step()
            optimizer.zero_grad()
        squares.append(square_of(clipper))
    return squares


def test_an_optimizer_that_steps_now_and_then(two_ranks):
    """The gradients of rank 1 add up to 1, 1 + 2, then 3, 3 + 4, and are in the norms of all."""
    needed = [2 * a**2 + 3 * b**2 for a, b in ((1, 1), (2, 3), (3, 3), (4, 7))]
    assert two_ranks.run(unlike_rounds) == [needed] * 2


def one_step(case: str) -> Any:
    """Take a step; under "a stage" the last rank alone has a loss to scale, as in a pipeline."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    [weight], [optimizer] = optimizers_of(2)
    scaler = rank_scaler(ShardedGradScaler if case == "sharded" else torch.amp.GradScaler)
    given = None if case == "sharded" else scaler
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=given)
    if case == "sharded" or is_last():
        scaler.scale(weight.sum()).backward()
    else:
        weight.grad = torch.full((2,), SCALE)
    scaler.step(optimizer)
    scaler.update()
    return square_of(clipper), scaler.get_scale()


@pytest.mark.parametrize("case", ["a stage", "sharded"])
def test_one_step(two_ranks, case):
    """Stages without a loss have the scale of the last; a scaler that agrees is not given."""
    assert two_ranks.run(one_step, case) == [(4.0, SCALE)] * 2


def copied_and_dropped() -> Any:
    _, [optimizer] = optimizers_of(2)
    scaler = rank_scaler()
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    copies = [copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))]
    kinds = [type(each) is torch.amp.GradScaler for each in (scaler, *copies)]
    clipper.detach()
    kinds.append(type(scaler) is torch.amp.GradScaler)
    GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    dropped = weakref.ref(scaler)
    del clipper, optimizer, scaler
    gc.collect()
    return kinds, dropped() is None


def test_copies_of_a_scaler(two_ranks):
    """They agree with nobody, and nothing keeps a scaler alive."""
    assert two_ranks.run(copied_and_dropped) == [([False, True, True, True], True)] * 2


def sharded_scaler() -> float:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    [weight], [optimizer] = optimizers_of(2)
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks())
    step_all(rank_scaler(ShardedGradScaler), [optimizer], weight.sum())
    return square_of(clipper)


def test_a_scaler_that_agrees_by_itself(two_ranks):
    """It need not be given to the clipper."""
    assert two_ranks.run(sharded_scaler) == [4.0] * 2


def attach_and_step(case: str) -> None:
    weights, optimizers = optimizers_of(2, 2)
    given = None if case in ("no scaler", "gradients computed between two steps") else rank_scaler()
    if case == "a scaler with replaced methods":
        given.unscale_ = print
    GradientClipper(optimizers, 1.0, ranks=Ranks(), grad_scaler=given)
    if case != "gradients computed between two steps":
        step_all(rank_scaler(), optimizers, torch.cat(weights).sum())
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("case", "needed"),
    [
        ("no scaler", "this very one as grad_scaler="),
        ("another scaler", "this very one as grad_scaler="),
        ("a scaler with replaced methods", "unscale_ of the GradScaler was replaced"),
        ("gradients computed between two steps", "give each of them a clipper of its own"),
    ],
)
def test_refusals(two_ranks, case, needed):
    """All ranks raise."""
    for message in two_ranks.errors(attach_and_step, case):
        assert message.startswith("AttachError")
        assert needed in message
