"""GradScaler on ranks that have different parameters: an overflow on one is one on all."""

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

from gradclip import AttachError, GradientClipper, Ranks
from tests.support.dtensors import spread
from tests.support.processes import on_ranks

KINDS = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
    "fused": lambda named: torch.optim.Adam(named, lr=0.1, fused=True),
    "unfused": lambda named: torch.optim.Adam(named, lr=0.1, foreach=False),
}
SCALE = 1024.0


def rank_scaler(kind: type = torch.amp.GradScaler) -> Any:
    return kind("cpu", init_scale=SCALE)


def is_itself(scaler: Any) -> bool:
    return type(scaler) is torch.amp.GradScaler


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


@pytest.mark.parametrize("when", ["in the step", "unscaled before"])
@pytest.mark.parametrize("kind", KINDS)
@on_ranks("ranks")
def test_one_optimizer(kind, when):
    """An overflow on the last rank skips a step on all, and the scaler is itself afterwards."""
    rank, count, last = distributed.get_rank(), distributed.get_world_size(), is_last()
    weight = nn.Parameter(torch.zeros(2 + rank))
    optimizer, scaler = KINDS[kind]([(f"weight{rank}", weight)]), rank_scaler()
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    total, rest = sum(range(2, 2 + count)), sum(range(2, 1 + count))
    squares = (total, rest, rest, total)
    rows = zip((1, 2, 2, 3), squares, (1, 1, 2, 2), (True, not last, False, True), strict=True)
    for step, (steps, square, divisor, moves) in enumerate(rows):
        optimizer.zero_grad()
        scaler.scale((weight * (math.inf if step == 2 and last else 1.0)).sum()).backward()
        if step == 1 and last:
            weight.grad = None
        if when == "unscaled before":
            scaler.unscale_(optimizer)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert (clipper.steps, scaler.get_scale()) == (steps, SCALE / divisor)
        assert square_of(clipper) == square
        assert torch.equal(weight.detach(), before) != moves
    clipper.detach()
    assert is_itself(scaler)


def joint_rows(used: int, bad: dict[int, dict[int, float]]) -> Any:
    """Take steps with two optimizers, of which rank 0 uses one and rank 1 both, with bad losses."""
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


@on_ranks("two_ranks")
def test_several_optimizers_with_a_scaler_that_is_disabled():
    """They step as without one."""
    weights, optimizers = optimizers_of(2, 3)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    clipper = GradientClipper(optimizers, 0.5, ranks=Ranks(), grad_scaler=scaler)
    step_all(scaler, optimizers, torch.stack([weight.sum() for weight in weights]).sum())
    assert (clipper.steps, square_of(clipper)) == (1, 10)


@pytest.mark.parametrize("used", [0, 1])
@on_ranks("two_ranks")
def test_several_optimizers(used):
    """An overflow of one leaves its gradients out on all ranks; one of all skips the step."""
    sizes = (2, 3)
    both = sum(sizes) + sizes[used]
    # The overflow of the optimizer that rank 0 has leaves the other's gradients on rank 1.
    without = {used: sizes[1 - used], 1 - used: 2 * sizes[used]}
    rows = [*enumerate((both, without[0], without[1], both, both), 1)]
    assert joint_rows(used, {1: {0: math.inf}, 2: {1: math.inf}}) == (rows, SCALE / 4)
    rows = [(steps, both) for steps in (1, 1, 2, 3, 4)]
    assert joint_rows(used, {1: {0: math.nan, 1: math.nan}}) == (rows, SCALE / 2)


@on_ranks("two_ranks")
def test_dtensors():
    """An overflow in the shard of one rank skips the step on all, without more options."""
    weight = nn.Parameter(spread(torch.zeros(4), "one", "0"))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), rank_scaler()
    clipper, bad = GradientClipper(optimizer, 0.5), math.inf if is_last() else 1.0
    for factor, steps, scale in ((1.0, 1, SCALE), (bad, 1, SCALE / 2), (1.0, 2, SCALE / 2)):
        optimizer.zero_grad()
        step_all(scaler, [optimizer], (weight.to_local() * factor).sum())
        assert (clipper.steps, square_of(clipper), scaler.get_scale()) == (steps, 4.0, scale)


@pytest.mark.parametrize("first", [0, 1])
@on_ranks("two_ranks")
def test_two_clippers_on_one_scaler(first):
    """They can be detached in any order, and the last gives the scaler its class back."""
    scaler, (weights, optimizers) = rank_scaler(), optimizers_of(2, 2)
    options = {"ranks": Ranks(), "grad_scaler": scaler}
    clippers = [GradientClipper(each, 0.5, **options) for each in optimizers]
    clippers[first].detach()
    bad = math.inf if distributed.get_rank() else 1.0
    step_all(scaler, [optimizers[1 - first]], (weights[1 - first] * bad).sum())
    clippers[1 - first].detach()
    assert clippers[1 - first].steps == 0
    assert is_itself(scaler)


@on_ranks("two_ranks")
def test_an_optimizer_that_steps_now_and_then():
    """The second of two, which is all that rank 1 has, steps every other time and adds up."""
    weights, optimizers = optimizers_of(2, 3)
    clipper = GradientClipper(optimizers, None, ranks=Ranks())
    for step, (first, second) in enumerate(((1, 1), (2, 3), (3, 3), (4, 7))):
        (weights[distributed.get_rank()] * (step + 1.0)).sum().backward()
        for optimizer in optimizers[: 1 + step % 2]:
            optimizer.step()
            optimizer.zero_grad()
        assert square_of(clipper) == 2 * first**2 + 3 * second**2


@pytest.mark.parametrize("case", ["a pipeline", "sharded"])
@on_ranks("two_ranks")
def test_other_scalers(case):
    """Stages without a loss have the scale of the last; a scaler that agrees is not given."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    [weight], [optimizer] = optimizers_of(2)
    scaler = rank_scaler(ShardedGradScaler if case == "sharded" else torch.amp.GradScaler)
    given = {} if case == "sharded" else {"grad_scaler": scaler}
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), **given)
    if case == "sharded" or is_last():
        scaler.scale(weight.sum()).backward()
    else:
        weight.grad = torch.full((2,), SCALE)
    scaler.step(optimizer)
    scaler.update()
    assert (square_of(clipper), scaler.get_scale()) == (4.0, SCALE)


@on_ranks("two_ranks")
def test_copies_of_a_scaler():
    """They agree with nobody, and nothing keeps a scaler alive."""
    _, [optimizer] = optimizers_of(2)
    scaler = rank_scaler()
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    assert not is_itself(scaler)
    assert is_itself(copy.deepcopy(scaler))
    assert is_itself(pickle.loads(pickle.dumps(scaler)))
    clipper.detach()
    assert is_itself(scaler)
    GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    dropped = weakref.ref(scaler)
    del clipper, optimizer, scaler
    gc.collect()
    assert dropped() is None


def attach_and_step(case: str) -> None:
    weights, optimizers = optimizers_of(2, 2)
    given = rank_scaler() if case in ("another scaler", "replaced methods") else None
    if case == "replaced methods":
        given.unscale_ = print
    GradientClipper(optimizers, 1.0, ranks=Ranks(), grad_scaler=given)
    if case != "gradients between two steps":
        step_all(rank_scaler(), optimizers, torch.cat(weights).sum())
    for weight, optimizer in zip(weights, optimizers, strict=True):
        weight.sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("case", "needed"),
    [
        ("no scaler", "this very one as grad_scaler="),
        ("another scaler", "this very one as grad_scaler="),
        ("replaced methods", "unscale_ of the GradScaler was replaced"),
        ("gradients between two steps", "give each of them a clipper of its own"),
    ],
)
@on_ranks("two_ranks")
def test_refusals(case, needed):
    """All ranks raise."""
    with pytest.raises(AttachError, match=needed):
        attach_and_step(case)
