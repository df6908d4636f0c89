"""GradScaler on ranks that have different parameters: an overflow on one is one on all."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import distributed, nn

from gradclip import AttachError, GradientClipper, Ranks
from gradclip.optimizers.shared_overflow import SharedOverflow

KINDS = {
    "sgd": lambda named: torch.optim.SGD(named, lr=0.1),
    "fused": lambda named: torch.optim.Adam(named, lr=0.1, fused=True),
    "unfused": lambda named: torch.optim.Adam(named, lr=0.1, foreach=False),
}
SCALE = 1024.0


def scaled(kind: str, when: str) -> Any:
    """Take 4 steps; at the third the last rank overflows, and at the second has no gradient."""
    rank, last = distributed.get_rank(), distributed.get_rank() == distributed.get_world_size() - 1
    weight = nn.Parameter(torch.zeros(2 + rank))
    optimizer = KINDS[kind]([(f"weight{rank}", weight)])
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        loss = (weight * (math.inf if step == 2 and last else 1.0)).sum()
        scaler.scale(loss).backward()
        if step == 1 and last:
            weight.grad = None
        if when == "unscaled before":
            scaler.unscale_(optimizer)
        before = weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(weight.detach(), before)
        norm = clipper.last.norm.square().item()
        found.append((clipper.steps, round(norm, 6), scaler.get_scale(), moved))
    clipper.detach()
    return found, type(scaler) is torch.amp.GradScaler


@pytest.mark.parametrize("when", ["in the step", "unscaled before"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(ranks, kind, when):
    each = ranks.run(scaled, kind, when)
    count = len(each)
    everything = sum(2 + rank for rank in range(count))
    for rank, (found, own) in enumerate(each):
        last = rank == count - 1
        assert own
        assert [row[0] for row in found] == [1, 2, 2, 3]
        assert [row[1] for row in found][:2] == [everything, everything - (2 + count - 1)]
        assert found[3][1] == everything
        assert [row[2] for row in found] == [SCALE, SCALE, SCALE / 2, SCALE / 2]
        assert [row[3] for row in found] == [True, not last, False, True]


def two_optimizers() -> tuple[int, list[nn.Parameter], list[torch.optim.Optimizer]]:
    rank = distributed.get_rank()
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizers = [torch.optim.SGD([(f"{rank}.{i}", w)], lr=0.1) for i, w in enumerate(weights)]
    return rank, weights, optimizers


def joint(order: str) -> Any:
    """Two optimizers, of which the first rank has gradients in one and the second in both."""
    rank, weights, optimizers = two_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = GradientClipper(optimizers, 0.5, ranks=Ranks(), grad_scaler=scaler)
    norms = []
    for step in range(3):
        clipper.zero_grad()
        used = weights if rank else weights[:1] if order == "first" else weights[1:]
        bad = step == 1 and rank == 1
        scaler.scale(sum((w * (math.nan if bad else 1.0)).sum() for w in used)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        norms.append((clipper.steps, round(clipper.last.norm.square().item(), 6)))
    return norms, scaler.get_scale()


@pytest.mark.parametrize("order", ["first", "second"])
def test_several_optimizers_of_which_a_rank_has_gradients_in_one(two_ranks, order):
    total = 5 + (2 if order == "first" else 3)
    expected = [(1, total), (1, total), (2, total)], SCALE / 2
    assert two_ranks.run(joint, order) == [expected] * 2


def nested() -> Any:
    """Two clippers with one scaler, of which the later one is detached first, or last."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    found = []
    for order in ((0, 1), (1, 0)):
        optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2)]
        options = {"ranks": Ranks(), "grad_scaler": scaler}
        clippers = [GradientClipper(each, 0.5, **options) for each in optimizers]
        clippers[order[0]].detach()
        [weight] = optimizers[order[1]].param_groups[0]["params"]
        bad = math.inf if distributed.get_rank() else 1.0
        scaler.scale((weight * bad).sum()).backward()
        scaler.step(optimizers[order[1]])
        scaler.update()
        clippers[order[1]].detach()
        found.append((clippers[order[1]].steps, type(scaler) is torch.amp.GradScaler))
    return found


def test_clippers_that_share_a_scaler_can_be_detached_in_any_order(two_ranks):
    [one, other] = two_ranks.run(nested)
    assert one == other
    assert [steps for steps, _ in one] == [0, 0]
    assert all(restored for _, restored in one)


def joint_overflow(order: tuple[int, int]) -> Any:
    """Two optimizers, of which the first rank has one, with an overflow of the other's at times."""
    rank, weights, optimizers = two_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = GradientClipper(optimizers, 0.5, ranks=Ranks(), grad_scaler=scaler)
    found = []
    for step in range(5):
        clipper.zero_grad()
        used = {order[0], order[rank]}  # the first rank has gradients of one of them alone
        factors = {index: math.inf if rank and step == 1 + index else 1.0 for index in used}
        scaler.scale(sum((weights[i] * factors[i]).sum() for i in used)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        found.append((clipper.steps, round(clipper.last.norm.square().item(), 6)))
    return found, scaler.get_scale()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_overflow_of_one_of_several_optimizers_is_one_on_all_ranks(two_ranks, order):
    one, other = two_ranks.run(joint_overflow, order)
    assert one == other
    sizes = [2, 3]
    both, own = sum(sizes) + sizes[order[0]], sizes[order[0]]
    # The other's overflow leaves the gradients of the one on two ranks; its own those of the other.
    without = {order[1]: 2 * own, order[0]: sizes[order[1]]}
    norms = [norm for _, norm in one[0]]
    assert norms == [both, without[0], without[1], both, both]
    assert one[1] == SCALE / 4


def unlike_rounds() -> Any:
    """Two optimizers, of which the second steps every other time, and is all that rank 1 has."""
    rank, weights, optimizers = two_optimizers()
    clipper = GradientClipper(optimizers, None, ranks=Ranks())
    norms = []
    for step in range(4):
        (weights[1 if rank else 0] * (step + 1.0)).sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        if step % 2:
            optimizers[1].step()
            optimizers[1].zero_grad()
        norms.append(round(clipper.last.norm.square().item(), 6))
    return norms


def test_an_optimizer_that_steps_now_and_then_is_in_the_norms_of_all_ranks(two_ranks):
    """The gradients of the second rank add up to 1, 1 + 2, then 3, 3 + 4 times its own."""
    needed = [2 * a**2 + 3 * b**2 for a, b in ((1, 1), (2, 3), (3, 3), (4, 7))]
    assert two_ranks.run(unlike_rounds) == [needed] * 2


def between() -> str:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    GradientClipper(optimizers, 1.0, ranks=Ranks())
    weights[0].sum().backward()
    optimizers[0].step()
    weights[1].sum().backward()
    with pytest.raises(AttachError) as caught:
        optimizers[1].step()
    return str(caught.value)


def test_gradients_computed_between_the_steps_of_several_optimizers_are_refused(two_ranks):
    for message in two_ranks.run(between):
        assert "give each of them a clipper of its own" in message


def last_stage_alone() -> Any:
    """As in a pipeline, the last rank alone has a loss to scale."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=scaler)
    loss = weight.sum()
    if distributed.get_rank() == distributed.get_world_size() - 1:
        scaler.scale(loss).backward()
    else:
        weight.grad = torch.full((2,), SCALE)
    scaler.step(optimizer)
    scaler.update()
    return clipper.last.norm.square().item(), scaler.get_scale()


def test_stages_that_scale_no_loss_have_the_scale_of_the_last(two_ranks):
    assert two_ranks.run(last_stage_alone) == [(pytest.approx(4.0), SCALE)] * 2


def copied_and_dropped() -> Any:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
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


def test_copies_of_a_scaler_agree_with_nobody_and_it_can_be_dropped(two_ranks):
    assert two_ranks.run(copied_and_dropped) == [([False, True, True, True], True)] * 2


def another_scaler() -> str:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    given, used = (torch.amp.GradScaler("cpu", init_scale=SCALE) for _ in range(2))
    GradientClipper(optimizer, 0.5, ranks=Ranks(), grad_scaler=given)
    used.scale(weight.sum()).backward()
    with pytest.raises(AttachError) as caught:
        used.step(optimizer)
    return str(caught.value)


def test_another_scaler_than_the_one_given_is_refused(two_ranks):
    for message in two_ranks.run(another_scaler):
        assert "this very one as grad_scaler=" in message


def test_a_scaler_whose_methods_were_replaced_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    scaler.unscale_ = print
    with pytest.raises(AttachError, match="unscale_ of the GradScaler was replaced"):
        SharedOverflow(scaler, [], None, torch.device("cpu"))


def without_being_given(sharded: bool) -> str:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    kind = ShardedGradScaler if sharded else torch.amp.GradScaler
    scaler = kind("cpu", init_scale=SCALE)
    clipper = GradientClipper(optimizer, 0.5, ranks=Ranks())
    scaler.scale(weight.sum()).backward()
    if sharded:
        scaler.step(optimizer)
        return f"{clipper.last.norm.square().item():.3f}"
    with pytest.raises(AttachError) as caught:
        scaler.step(optimizer)
    return str(caught.value)


def test_a_scaler_that_ranks_do_not_agree_on_is_refused(two_ranks):
    for message in two_ranks.run(without_being_given, False):
        assert "this very one as grad_scaler=" in message


def test_a_scaler_that_agrees_by_itself_need_not_be_given(two_ranks):
    assert two_ranks.run(without_being_given, True) == ["4.000"] * 2
