"""Training loops with what torch puts around an optimizer, against clipping by hand."""

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR

from gradclip import AttachError, GradientClipper, MemorySink
from tests.support.clippers import CALLS, step_by
from tests.support.trainings import (
    THRESHOLD,
    assert_close,
    loader,
    loss_of,
    momentum,
    net_of,
    values,
)
from tests.support.twins import Twins, clip_by_hand, joint_norm

CLIPPED = pytest.approx(THRESHOLD, rel=1e-6)
BATCHES = [*loader()]
"""Of every fourth the gradients are far above the threshold, from the one with index 3 on."""


def backward(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss = loss_of(model, [each.to(dtype) for each in BATCHES[step % len(BATCHES)]])
    loss.backward()
    return loss


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=15),
    "on plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.5),
    "averaging": lambda optimizer: SWALR(optimizer, swa_lr=0.01, anneal_epochs=5),
}


@pytest.mark.parametrize("step_of", ["optimizer", "clipper"])
@pytest.mark.parametrize("first", ["scheduler", "clipper"])
@pytest.mark.parametrize("scheduler_of", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_sets_the_same_rates_as_by_hand(scheduler_of, first, step_of):
    """It wraps the optimizer's step, before or after the clipper attaches."""

    def train(*, clips: bool) -> tuple[nn.Module, list[Any]]:
        model, rates = net_of(), []
        optimizer = momentum(model)
        if first == "scheduler":
            scheduler = scheduler_of(optimizer)
        clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
        if first == "clipper":
            scheduler = scheduler_of(optimizer)
        for step in range(15):
            loss = backward(model, optimizer, step)
            if clipper is None:
                clip_by_hand(optimizer)
            (clipper if clips and step_of == "clipper" else optimizer).step()
            rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
            scheduler.step(*[loss.item()] * isinstance(scheduler, ReduceLROnPlateau))
        assert clipper is None or (clipper.steps == 15 and 0.2 < clipper.clip_rate() < 0.8)
        return model, rates

    (ours, rates), (theirs, expected) = train(clips=True), train(clips=False)
    assert rates == expected
    assert len({str(rate) for rate in rates}) > 3
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS[:2])
def test_a_step_inside_autocast(call, dtype):
    """It equals one outside, bit for bit, and one clipped by hand."""

    def train(clips: str) -> tuple[Tensor, list[float]]:
        model, norms = net_of().to(dtype), []
        optimizer = momentum(model)
        clipper = None if clips == "by hand" else GradientClipper(optimizer, THRESHOLD)
        for step in range(9):

            def closure(step: int = step) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = backward(model, optimizer, step)
                norms.append(joint_norm(optimizer))
                if clips == "by hand":
                    clip_by_hand(optimizer)
                return loss

            inside = clips == "inside"
            with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
                step_by(optimizer, call, closure)
                assert torch.is_autocast_enabled("cpu") is inside
            if clipper is not None:
                assert clipper.last.norm.dtype is torch.float64
                assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-6)
        return values(model), norms

    (inside, norms), (outside, norms_outside) = train("inside"), train("outside")
    assert norms == norms_outside
    assert max(norms) > THRESHOLD > min(norms)
    assert torch.equal(inside, outside)
    # One rounding apart is as good as equal.
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (torch.finfo(dtype).eps, 1e-3)
    torch.testing.assert_close(inside, train("by hand")[0], rtol=rtol, atol=atol)


# torch itself, on Python 3.13.0:
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_model():
    compiled, model = torch.compile(net_of(), backend="eager"), net_of()
    models = iter([compiled, model])
    twins = Twins(lambda: [momentum(next(models))], THRESHOLD, model=compiled)
    for step in range(9):
        backward(compiled, twins.ours[0], step)
        backward(model, twins.theirs[0], step)
        twins.ours[0].step()
        twins.take_by_hand(tolerance=1e-4)
    assert 0.2 < twins.clipper.clip_rate() < 0.8
    twins.check()


@pytest.fixture
def watched() -> Iterator[tuple[nn.Module, Optimizer, dict[str, float]]]:
    """Return a model, its optimizer, and the norms that hooks all around a clipper's see."""
    model, norms = net_of(), {}
    optimizer = momentum(model)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: norms.update({name: joint_norm(optimizer)})

    handles = [
        register_optimizer_step_pre_hook(note("global before")),
        register_optimizer_step_post_hook(note("global after")),
    ]
    optimizer.register_step_pre_hook(note("before, registered first"))
    optimizer.register_step_post_hook(note("after, registered first"))
    GradientClipper(optimizer, THRESHOLD)
    optimizer.register_step_pre_hook(note("before, registered last"))
    optimizer.register_step_post_hook(note("after, registered last"))
    yield model, optimizer, norms
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_see_the_gradients_as_they_are_at_their_turn(with_closure, watched):
    model, optimizer, norms = watched
    backward(model, optimizer, 7 if with_closure else 3)
    norm = joint_norm(optimizer)
    assert norm > 1.5 * THRESHOLD
    optimizer.step(*[lambda: backward(model, optimizer, 3)] * with_closure)
    assert norms == {
        "global before": norm,
        "before, registered first": norm,
        "before, registered last": norm if with_closure else CLIPPED,
        "after, registered first": CLIPPED,
        "after, registered last": CLIPPED,
        "global after": CLIPPED,
    }


def adding(closure: Callable[[], Tensor], how: str = "by position") -> Callable[..., Any]:
    """Return a hook that gives a step a closure."""
    if how == "by position":
        return lambda _, args, kwargs: ((args[0], closure), kwargs)
    return lambda _, args, kwargs: (args, {"closure": closure})


@pytest.mark.parametrize("how", ["by position", "by keyword"])
@pytest.mark.parametrize("where", ["own hook", "global hook"])
def test_a_closure_that_an_earlier_hook_adds_is_clipped(how, where):
    model = net_of()
    optimizer, losses = momentum(model), []

    def closure() -> Tensor:
        losses.append(backward(model, optimizer, 3))
        losses.append(joint_norm(optimizer))
        return losses[0]

    register = optimizer.register_step_pre_hook
    handle = (register_optimizer_step_pre_hook if where == "global hook" else register)(
        adding(closure, how)
    )
    clipper = GradientClipper(optimizer, THRESHOLD)
    try:
        loss = optimizer.step()
    finally:
        handle.remove()
    [needed, norm] = losses
    assert loss is needed
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert joint_norm(optimizer) == CLIPPED


def test_earlier_hooks_may_change_gradients_and_drop_the_closure():
    """The gradients that are there then are clipped."""
    model = net_of()
    optimizer = momentum(model)

    def halve(_: Optimizer, args: Any, kwargs: Any) -> Any:
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)
        return args[:1], {}

    optimizer.register_step_pre_hook(halve)
    clipper = GradientClipper(optimizer, THRESHOLD)
    backward(model, optimizer, 3)
    norm = joint_norm(optimizer)
    optimizer.step(lambda: pytest.fail("it was dropped"))
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm / 2, rel=1e-6)
    assert joint_norm(optimizer) == CLIPPED


def test_a_closure_that_a_later_hook_adds_is_refused():
    model = net_of()
    optimizer = momentum(model)
    clipper = GradientClipper(optimizer, THRESHOLD)
    optimizer.register_step_pre_hook(adding(lambda: backward(model, optimizer, 3)))
    backward(model, optimizer, 1)
    with pytest.raises(AttachError, match="added a closure after the clipper's hook"):
        optimizer.step()
    assert clipper.steps == 0


THREADS = (
    (momentum, {"nonfinite": "zero"}),
    (
        lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
        {"nonfinite": "skip", "norm_type": 3.0, "max_value": 0.5},
    ),
)


def train_logged(which: int, model: nn.Module) -> Any:
    """Train 200 steps, some with a NaN; return what the clipper has seen and left."""
    optimizer_of, options = THREADS[which]
    optimizer, sink = optimizer_of(model), MemorySink()
    with GradientClipper(optimizer, 0.7 + which, log=sink, **options) as clipper:
        for step in range(200):

            def closure(step: int = step) -> Tensor:
                loss = backward(model, optimizer, step + which)
                if step % 50 == 49:
                    next(iter(model.parameters())).grad[0, 0] = math.nan
                return loss

            step_by(optimizer, CALLS[1 - which], closure)
        state = clipper.state_dict()
    rows = [repr((s.step, s.norm, s.clipped_norm, s.clip_rate, s.skipped)) for s in sink.steps]
    return values(model).tolist(), rows, state


def test_two_threads_give_what_they_give_one_after_the_other():
    expected = [train_logged(which, net_of(which)) for which in range(2)]
    found: list[Any] = [None, None]
    models, together = [net_of(which) for which in range(2)], threading.Barrier(2)

    def work(which: int) -> None:
        together.wait(30)
        found[which] = train_logged(which, models[which])

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert found == expected
    for which, (_, rows, state) in enumerate(expected):
        assert state["steps"] == len(rows) == 200
        assert state["counters"]["nonfinite_steps"] == 4
        assert state["counters"]["skipped_steps"] == 4 * which
        assert 20 < state["counters"]["clipped"] < 180
