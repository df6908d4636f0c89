"""Whole training loops, with what torch puts around an optimizer, against clipping by hand."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

from gradclip import AttachError, GradientClipper

THRESHOLD = 1.0
SCALES = (0.3, 3.0, 30.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""
COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda what: pickle.loads(pickle.dumps(what))}


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 9, generator=generator).to(dtype)
    return (model(batch[:, :6]) - batch[:, 6:]).square().mean() * SCALES[step % len(SCALES)]


def backward(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    loss.backward()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def norm64(model_or_gradients: Any) -> float:
    found = model_or_gradients
    if isinstance(found, nn.Module):
        found = gradients(found)
    return math.sqrt(sum(gradient.double().square().sum().item() for gradient in found))


def clip_by_hand(model: nn.Module, threshold: float = THRESHOLD) -> float:
    norm = norm64(model)
    if norm > threshold:
        for parameter in model.parameters():
            if parameter.grad is not None:
                scaled = parameter.grad.double() * (threshold / norm)
                parameter.grad = scaled.to(parameter.grad.dtype)
    return norm


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def assert_close(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(values(found), values(expected), rtol=1e-5, atol=1e-6)


def assert_unlike(found: nn.Module, other: nn.Module) -> None:
    assert (values(found) - values(other)).abs().max() > 1e-3


def state_bits(optimizer: Optimizer) -> bytes:
    return pickle.dumps(
        [
            {name: v.tolist() if isinstance(v, Tensor) else v for name, v in state.items()}
            for state in optimizer.state_dict()["state"].values()
        ]
    )


def test_only_the_step_clips_what_several_backwards_have_accumulated():
    ours, theirs, each_backward = model_of(), model_of(), model_of()
    optimizers = [momentum(model) for model in (ours, theirs, each_backward)]
    clipper = GradientClipper(optimizers[0], THRESHOLD)
    norms = []
    for step in range(8):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part in range(3):
            for model in (ours, theirs, each_backward):
                loss_of(model, 3 * step + part).backward()
            clip_by_hand(each_backward)
            norms.append(norm64(ours))
            assert clipper.steps == step
        assert norms[-1] == pytest.approx(norm64(theirs), rel=1e-4)
        clip_by_hand(theirs)
        for optimizer in optimizers:
            optimizer.step()
        assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-6)
        assert norm64(ours) == pytest.approx(min(norms[-1], THRESHOLD), rel=1e-6)
    assert clipper.steps == 8
    assert sum(norm > THRESHOLD for norm in norms) > 8
    assert_close(ours, theirs)
    assert_unlike(ours, each_backward)


def one_cycle(optimizer: Optimizer) -> LRScheduler:
    return OneCycleLR(optimizer, max_lr=0.1, total_steps=15)


def on_plateau(optimizer: Optimizer) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


def scheduled(
    scheduler_of: Callable[[Optimizer], Any], first: str, step_of: str, *, clips: bool
) -> tuple[nn.Module, list[Any]]:
    """Train with a scheduler; return the model and what the scheduler has set at each step."""
    model = model_of()
    optimizer = momentum(model)
    if first == "scheduler":
        scheduler = scheduler_of(optimizer)
    clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
    if first == "clipper":
        scheduler = scheduler_of(optimizer)
    rates = []
    for step in range(15):
        loss = backward(model, optimizer, step)
        if clipper is None:
            clip_by_hand(model)
        if clipper is not None and step_of == "clipper":
            clipper.step()
        else:
            optimizer.step()
        rates.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        scheduler.step(*[loss.item()] * isinstance(scheduler, ReduceLROnPlateau))
    if clipper is not None:
        assert clipper.steps == 15
        assert 0.2 < clipper.clip_rate() < 0.8
    return model, rates


@pytest.mark.parametrize("step_of", ["optimizer", "clipper"])
@pytest.mark.parametrize("first", ["scheduler", "clipper"])
@pytest.mark.parametrize("scheduler_of", [one_cycle, on_plateau])
def test_a_scheduler_sets_the_same_rates_as_in_a_run_clipped_by_hand(scheduler_of, first, step_of):
    ours, rates = scheduled(scheduler_of, first, step_of, clips=True)
    theirs, expected = scheduled(scheduler_of, first, step_of, clips=False)
    assert rates == expected
    assert len({str(rate) for rate in rates}) > 3
    assert_close(ours, theirs)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averaged_weights_equal_those_of_a_run_clipped_by_hand(average):
    def train(*, clips: bool) -> tuple[nn.Module, nn.Module, list[float]]:
        model = model_of()
        optimizer = momentum(model)
        averaged = AveragedModel(model, multi_avg_fn=average)
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=5)
        clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
        rates = []
        for step in range(12):
            backward(model, optimizer, step)
            if clipper is None:
                clip_by_hand(model)
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            if step >= 4:
                averaged.update_parameters(model)
                scheduler.step()
        assert clipper is None or 0.2 < clipper.clip_rate() < 0.8
        return model, averaged, rates

    model, averaged, rates = train(clips=True)
    by_hand, averaged_by_hand, expected = train(clips=False)
    assert rates == expected
    assert len(set(rates)) > 3
    assert_close(model, by_hand)
    assert_close(averaged, averaged_by_hand)
    assert_unlike(averaged, model)


def falling(step: int) -> float:
    return 2.0 / (step + 1)


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
def test_a_copy_of_the_optimizer_is_free_until_a_new_clipper_continues(copier):
    model = model_of()
    optimizer = momentum(model)
    clipper = GradientClipper(optimizer, falling)
    for step in range(5):
        backward(model, optimizer, step)
        optimizer.step()
    saved = pickle.loads(pickle.dumps(clipper.state_dict()))
    free, free_optimizer = copier((model, optimizer))
    twin, twin_optimizer = copier((model, optimizer))

    backward(free, free_optimizer, 5)
    before = norm64(free)
    free_optimizer.step()
    assert norm64(free) == before > 2 * falling(5)
    assert clipper.steps == 5

    continued = GradientClipper(twin_optimizer, falling)
    continued.load_state_dict(saved)
    for step in range(5, 10):
        for each, its_optimizer in ((model, optimizer), (twin, twin_optimizer)):
            backward(each, its_optimizer, step)
            its_optimizer.step()
        assert continued.last.step == clipper.last.step == step
        assert continued.last.threshold.item() == clipper.last.threshold.item() == falling(step)
        assert continued.last.norm.item() == clipper.last.norm.item()
    assert torch.equal(values(twin), values(model))
    assert state_bits(twin_optimizer) == state_bits(optimizer)
    assert continued.state_dict() == clipper.state_dict()
    assert 0 < clipper.clip_rate() < 1


@pytest.mark.parametrize("by_pickle", [False, True])
def test_a_loaded_optimizer_state_keeps_the_clipper_and_repeats_the_steps(by_pickle):
    model = model_of()
    optimizer = AdamW(model.parameters(), lr=0.05)
    clipper = GradientClipper(optimizer, THRESHOLD)

    def train(steps: range) -> list[float]:
        norms = []
        for step in steps:
            backward(model, optimizer, step)
            optimizer.step()
            norms.append(clipper.last.norm.item())
            assert norm64(model) == pytest.approx(min(norms[-1], THRESHOLD), rel=1e-6)
        return norms

    train(range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = train(range(3, 9))
    expected, expected_state = values(model), state_bits(optimizer)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(pickle.loads(pickle.dumps(saved[1])) if by_pickle else saved[1])
    assert train(range(3, 9)) == first
    assert torch.equal(values(model), expected)
    assert state_bits(optimizer) == expected_state
    assert clipper.steps == 3 + 6 + 6
    assert max(first) > THRESHOLD > min(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_inside_autocast_equals_one_outside_and_one_by_hand(with_closure, dtype):
    def train(clips: str) -> tuple[nn.Module, list[float]]:
        model = model_of(dtype)
        optimizer = momentum(model)
        clipper = None if clips == "by hand" else GradientClipper(optimizer, THRESHOLD)
        norms = []
        for step in range(9):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = loss_of(model, step, dtype)
                loss.backward()
                norms.append(norm64(model))
                if clips == "by hand":
                    clip_by_hand(model)
                return loss

            around = torch.autocast("cpu", dtype=torch.bfloat16)
            with around if clips == "inside" else nullcontext():
                if with_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
                assert torch.is_autocast_enabled("cpu") is (clips == "inside")
            if clipper is not None:
                assert clipper.last.norm.dtype is torch.float64
                assert clipper.last.norm.item() == pytest.approx(norms[-1], rel=1e-6)
        return model, norms

    inside, norms = train("inside")
    outside, norms_outside = train("outside")
    by_hand, _ = train("by hand")
    assert norms == norms_outside
    assert max(norms) > THRESHOLD > min(norms)
    assert torch.equal(values(inside), values(outside))
    # One rounding apart is as good as equal.
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (torch.finfo(dtype).eps, 1e-3)
    torch.testing.assert_close(values(inside), values(by_hand), rtol=rtol, atol=atol)


# torch itself, on Python 3.13.0:
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_model_is_clipped_as_by_hand():
    ours, theirs = model_of(), model_of()
    compiled = torch.compile(ours, backend="eager")
    optimizer, by_hand = momentum(compiled), momentum(theirs)
    clipper = GradientClipper(optimizer, THRESHOLD, model=compiled)
    for step in range(9):
        backward(compiled, optimizer, step)
        norm = norm64(ours)
        optimizer.step()
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
        assert norm64(ours) == pytest.approx(min(norm, THRESHOLD), rel=1e-6)
        backward(theirs, by_hand, step)
        clip_by_hand(theirs)
        by_hand.step()
    assert 0.2 < clipper.clip_rate() < 0.8
    assert_close(ours, theirs)


# Hooks of others


@pytest.fixture
def watched() -> Iterator[tuple[nn.Module, Optimizer, dict[str, float]]]:
    """Return a model, its optimizer, and the norms that hooks all around a clipper's see."""
    model = model_of()
    optimizer = momentum(model)
    seen: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda *_: seen.update({name: norm64(model)})

    handles = [
        register_optimizer_step_pre_hook(watch("global before")),
        register_optimizer_step_post_hook(watch("global after")),
    ]
    optimizer.register_step_pre_hook(watch("before, registered first"))
    optimizer.register_step_post_hook(watch("after, registered first"))
    GradientClipper(optimizer, THRESHOLD)
    optimizer.register_step_pre_hook(watch("before, registered last"))
    optimizer.register_step_post_hook(watch("after, registered last"))
    yield model, optimizer, seen
    for handle in handles:
        handle.remove()


def test_hooks_see_the_gradients_as_they_are_at_their_turn(watched):
    model, optimizer, seen = watched
    backward(model, optimizer, 2)
    norm = norm64(model)
    assert norm > 2 * THRESHOLD
    optimizer.step()
    clipped = pytest.approx(THRESHOLD, rel=1e-6)
    assert seen == {
        "global before": norm,
        "before, registered first": norm,
        "before, registered last": clipped,
        "after, registered first": clipped,
        "after, registered last": clipped,
        "global after": clipped,
    }


def test_with_a_closure_the_hooks_after_the_step_see_clipped_gradients(watched):
    model, optimizer, seen = watched
    backward(model, optimizer, 1)
    stale = norm64(model)
    optimizer.step(lambda: backward(model, optimizer, 2))
    assert seen["before, registered first"] == seen["before, registered last"] == stale
    for name in ("after, registered first", "after, registered last", "global after"):
        assert seen[name] == pytest.approx(THRESHOLD, rel=1e-6)


@pytest.mark.parametrize("how", ["by position", "by keyword"])
@pytest.mark.parametrize("where", ["own hook", "global hook"])
def test_a_closure_that_an_earlier_hook_adds_is_clipped(how, where):
    ours, theirs = model_of(), model_of()
    optimizer, by_hand = momentum(ours), momentum(theirs)
    losses: list[Tensor] = []

    def add(stepping: Optimizer, args: Any, kwargs: Any) -> Any:
        def closure() -> Tensor:
            losses.append(backward(ours, optimizer, 2))
            return losses[-1]

        assert stepping is optimizer
        if how == "by position":
            return (args[0], closure), kwargs
        return args, {"closure": closure}

    register = optimizer.register_step_pre_hook
    handle = (register_optimizer_step_pre_hook if where == "global hook" else register)(add)
    clipper = GradientClipper(optimizer, THRESHOLD)
    try:
        assert optimizer.step() is losses[0]
    finally:
        handle.remove()
    assert len(losses) == 1
    backward(theirs, by_hand, 2)
    norm = clip_by_hand(theirs)
    by_hand.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert norm64(ours) == pytest.approx(THRESHOLD, rel=1e-6)
    assert_close(ours, theirs)


def test_a_gradient_that_an_earlier_hook_changes_is_measured_as_changed():
    model = model_of()
    optimizer = momentum(model)

    def halve(*_: Any) -> None:
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    clipper = GradientClipper(optimizer, THRESHOLD)
    backward(model, optimizer, 2)
    norm = norm64(model)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(norm / 2, rel=1e-6)


def test_a_hook_that_drops_the_closure_leaves_the_gradients_there_to_be_clipped():
    model = model_of()
    optimizer = momentum(model)
    optimizer.register_step_pre_hook(lambda _, args, __: (args[:1], {}))
    clipper = GradientClipper(optimizer, THRESHOLD)
    backward(model, optimizer, 2)
    optimizer.step(lambda: pytest.fail("it was dropped"))
    assert clipper.steps == 1
    assert norm64(model) == pytest.approx(THRESHOLD, rel=1e-6)


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


def plain_kind(model: nn.Module) -> Optimizer:
    return momentum(model)


def fused_kind(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, fused=True)


KINDS = (
    (plain_kind, {"nonfinite": "zero"}, True),
    (fused_kind, {"nonfinite": "skip", "norm_type": 3.0, "max_value": 0.5}, False),
)


def train_logged(which: int, directory: Any) -> Any:
    """Train 200 steps, some with a NaN; return all that can be told of it."""
    kind, options, with_closure = KINDS[which]
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    generator = torch.Generator().manual_seed(which)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    optimizer = kind(model)
    norms, coefficients = [], []
    with GradientClipper(optimizer, 0.7 + which, log=directory, **options) as clipper:
        for step in range(200):

            def closure(step: int = step) -> Tensor:
                loss = backward(model, optimizer, step + 1000 * which)
                if step % 50 == 49:
                    next(iter(model.parameters())).grad[0, 0] = math.nan
                return loss

            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            norms.append(clipper.last.norm.item())
            coefficients.append(clipper.last.coefficient.item())
        state = clipper.state_dict()
    reader = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(point.step, repr(point.value)) for point in reader.Scalars(tag)]
        for tag in reader.Tags()["scalars"]
    }
    return values(model).tolist(), repr(norms), coefficients, state, curves


def test_two_threads_give_what_they_give_one_after_the_other(tmp_path):
    expected = [train_logged(which, tmp_path / f"alone {which}") for which in range(2)]
    found: list[Any] = [None, None]
    together = threading.Barrier(2)

    def work(which: int) -> None:
        together.wait(30)
        found[which] = train_logged(which, tmp_path / f"together {which}")

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
    assert expected[0] != expected[1]
    for which, (_, norms, coefficients, state, curves) in enumerate(expected):
        assert state["steps"] == len(curves["grad_norm/pre"]) == 200
        assert norms.count("nan") == state["counters"]["nonfinite_steps"] == 4
        assert state["counters"]["skipped_steps"] == 4 * which
        assert 20 < sum(coefficient < 1 for coefficient in coefficients) < 180


# What is clipped


@pytest.mark.parametrize("own", [False, True])
def test_a_group_added_in_mid_training_is_clipped_from_then_on(own):
    def train(*, clips: bool) -> tuple[nn.Module, GradientClipper | None]:
        model = nn.ModuleList([model_of(), nn.Linear(3, 3)])
        nn.init.eye_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        optimizer = momentum(model[0])
        clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
        for step in range(12):
            if step == 5:
                added = {"params": list(model[1].parameters()), "lr": 0.02}
                optimizer.add_param_group({**added, "max_norm": 0.4} if own else added)
            model.zero_grad()
            loss_of(nn.Sequential(*model), step).backward()
            parts = [norm64(model[0]), norm64(model[1])]
            if step < 5:
                expected = [parts[0]]
            elif own:
                expected = parts
            else:
                expected = [math.hypot(*parts)]
            if clipper is None and (own or step < 5):
                clip_by_hand(model[0])
                if step >= 5:
                    clip_by_hand(model[1], 0.4)
            elif clipper is None:
                clip_by_hand(model)
            optimizer.step()
            if clipper is not None:
                assert clipper.last.norm.reshape(-1).tolist() == pytest.approx(expected, rel=1e-6)
                if step == 4:
                    assert norm64(model[1]) == parts[1] > 0
        return model, clipper

    ours, clipper = train(clips=True)
    theirs, _ = train(clips=False)
    assert clipper.labels == (("global", "group 1") if own else ("global",))
    assert 0.2 < clipper.clip_rate() < 0.9
    assert_close(ours, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_and_unused_parameters_count_once_they_have_gradients(set_to_none):
    def train(*, clips: bool) -> nn.Module:
        model = nn.ModuleList([model_of(), nn.Linear(2, 2)])  # the second is never used
        frozen = model[0][0].weight
        frozen.requires_grad_(False)
        optimizer = momentum(model)
        clipper = GradientClipper(optimizer, THRESHOLD) if clips else None
        begun = frozen.clone(), values(model[1])
        for step in range(12):
            if step == 6:
                assert torch.equal(frozen, begun[0])
                frozen.requires_grad_(True)
            if step == 9:  # frozen again, with the last gradient that it had
                frozen.requires_grad_(False)
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(model[0], step).backward()
            norm = norm64(model)
            if clipper is None:
                clip_by_hand(model)
            optimizer.step()
            if clipper is not None:
                assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
            assert (frozen.grad is None) == (step < 6 or (step >= 9 and set_to_none))
            assert all(p.grad is None for p in model[1].parameters())
        assert not torch.equal(frozen, begun[0])
        assert torch.equal(values(model[1]), begun[1])
        assert clipper is None or 0.2 < clipper.clip_rate() < 0.8
        return model

    assert_close(train(clips=True), train(clips=False))


def test_a_stale_gradient_of_a_frozen_parameter_counts_as_the_optimizer_uses_it():
    model = model_of()
    optimizer = SGD(model.parameters(), lr=1.0)
    clipper = GradientClipper(optimizer, THRESHOLD)
    backward(model, optimizer, 2)
    frozen = model[0].weight
    frozen.requires_grad_(False)
    before, norm, gradient = frozen.clone(), norm64(model), frozen.grad.clone()
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(frozen, before - gradient * (THRESHOLD / norm))
