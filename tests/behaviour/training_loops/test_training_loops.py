"""Training loops with what torch puts around an optimizer, against clipping by hand."""

from __future__ import annotations

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
from tests.support.reference import gradient_norm
from tests.support.trainings import assert_close, momentum, values

THRESHOLD = 1.0
CLIPPED = pytest.approx(THRESHOLD, rel=1e-6)
SCALES = (0.3, 3.0, 30.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""


def model_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(seed)  # threads share torch's own
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.to(dtype)


def loop_loss(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 9, generator=generator).to(dtype)
    return (model(batch[:, :6]) - batch[:, 6:]).square().mean() * SCALES[step % len(SCALES)]


def backward(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loop_loss(model, step)
    loss.backward()
    return loss


def module_norm(model: nn.Module) -> float:
    return gradient_norm(model.parameters())


def clip_loop(model: nn.Module) -> float:
    norm = module_norm(model)
    for parameter in model.parameters():
        if norm > THRESHOLD and parameter.grad is not None:
            scaled = parameter.grad.double() * (THRESHOLD / norm)
            parameter.grad = scaled.to(parameter.grad.dtype)
    return norm


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
        model, rates = model_of(), []
        optimizer = momentum(model)
        if first == "scheduler":
            scheduler = scheduler_of(optimizer)
        clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
        if first == "clipper":
            scheduler = scheduler_of(optimizer)
        for step in range(15):
            loss = backward(model, optimizer, step)
            if clipper is None:
                clip_loop(model)
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
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_inside_autocast(with_closure, dtype):
    """It equals one outside, bit for bit, and one clipped by hand."""

    def train(clips: str) -> tuple[Tensor, list[float]]:
        model, norms = model_of(dtype), []
        optimizer = momentum(model)
        clipper = None if clips == "by hand" else GradientClipper(optimizer, THRESHOLD)
        for step in range(9):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loop_loss(model, step, dtype)
                loss.backward()
                norms.append(clip_loop(model) if clips == "by hand" else module_norm(model))
                return loss

            inside = clips == "inside"
            with torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext():
                if with_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
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
    ours, theirs = model_of(), model_of()
    compiled = torch.compile(ours, backend="eager")
    optimizer, by_hand = momentum(compiled), momentum(theirs)
    clipper = GradientClipper(optimizer, THRESHOLD, model=compiled)
    for step in range(9):
        backward(compiled, optimizer, step)
        backward(theirs, by_hand, step)
        norm = clip_loop(theirs)
        optimizer.step()
        by_hand.step()
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-4)
    assert 0.2 < clipper.clip_rate() < 0.8
    assert_close(ours, theirs)


# Hooks of others


@pytest.fixture
def watched() -> Iterator[tuple[nn.Module, Optimizer, dict[str, float]]]:
    """Return a model, its optimizer, and the norms that hooks all around a clipper's see."""
    model, norms = model_of(), {}
    optimizer = momentum(model)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: norms.update({name: module_norm(model)})

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
    backward(model, optimizer, 1 if with_closure else 2)
    norm = module_norm(model)
    assert norm > 1.5 * THRESHOLD
    optimizer.step(*[lambda: backward(model, optimizer, 2)] * with_closure)
    assert norms == {
        "global before": norm,
        "before, registered first": norm,
        "before, registered last": norm if with_closure else CLIPPED,
        "after, registered first": CLIPPED,
        "after, registered last": CLIPPED,
        "global after": CLIPPED,
    }


@pytest.mark.parametrize("how", ["by position", "by keyword"])
@pytest.mark.parametrize("where", ["own hook", "global hook"])
def test_a_closure_that_an_earlier_hook_adds_is_clipped(how, where):
    ours, theirs = model_of(), model_of()
    optimizer, by_hand = momentum(ours), momentum(theirs)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(backward(ours, optimizer, 2))
        return losses[-1]

    def add(_: Optimizer, args: Any, kwargs: Any) -> Any:
        by_position = how == "by position"
        return ((args[0], closure), kwargs) if by_position else (args, {"closure": closure})

    register = optimizer.register_step_pre_hook
    handle = (register_optimizer_step_pre_hook if where == "global hook" else register)(add)
    clipper = GradientClipper(optimizer, THRESHOLD)
    try:
        assert optimizer.step() is losses[0]
    finally:
        handle.remove()
    assert len(losses) == 1
    backward(theirs, by_hand, 2)
    norm = clip_loop(theirs)
    by_hand.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert module_norm(ours) == CLIPPED
    assert_close(ours, theirs)


def test_earlier_hooks_may_change_gradients_and_drop_the_closure():
    """The gradients that are there then are clipped."""
    model = model_of()
    optimizer = momentum(model)

    def halve(_: Optimizer, args: Any, kwargs: Any) -> Any:
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)
        return args[:1], {}

    optimizer.register_step_pre_hook(halve)
    clipper = GradientClipper(optimizer, THRESHOLD)
    backward(model, optimizer, 2)
    norm = module_norm(model)
    optimizer.step(lambda: pytest.fail("it was dropped"))
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(norm / 2, rel=1e-6)
    assert module_norm(model) == CLIPPED


def test_a_closure_that_a_later_hook_adds_is_refused():
    model = model_of()
    optimizer = momentum(model)
    clipper = GradientClipper(optimizer, THRESHOLD)
    optimizer.register_step_pre_hook(
        lambda _, args, kwargs: ((args[0], lambda: backward(model, optimizer, 2)), kwargs)
    )
    backward(model, optimizer, 1)
    with pytest.raises(AttachError, match="added a closure after the clipper's hook"):
        optimizer.step()
    assert clipper.steps == 0


# Threads

THREADS = (
    (momentum, {"nonfinite": "zero"}),
    (
        lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
        {"nonfinite": "skip", "norm_type": 3.0, "max_value": 0.5},
    ),
)


def train_logged(which: int) -> Any:
    """Train 200 steps, some with a NaN; return what the clipper has seen and left."""
    optimizer_of, options = THREADS[which]
    model, sink = model_of(seed=which), MemorySink()
    optimizer = optimizer_of(model)
    with GradientClipper(optimizer, 0.7 + which, log=sink, **options) as clipper:
        for step in range(200):

            def closure(step: int = step) -> Tensor:
                loss = backward(model, optimizer, step + 1000 * which)
                if step % 50 == 49:
                    next(iter(model.parameters())).grad[0, 0] = math.nan
                return loss

            if which == 0:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        state = clipper.state_dict()
    rows = [repr((s.step, s.norm, s.clipped_norm, s.clip_rate, s.skipped)) for s in sink.steps]
    return values(model).tolist(), rows, state


def test_two_threads_give_what_they_give_one_after_the_other():
    expected = [train_logged(which) for which in range(2)]
    found: list[Any] = [None, None]
    together = threading.Barrier(2)

    def work(which: int) -> None:
        together.wait(30)
        found[which] = train_logged(which)

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
