"""Optimizers of other packages, against the same steps clipped by hand, bit for bit."""

import importlib
import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradclip import AttachError, GradientClipper, clip_grad_norm_
from tests.support.reference import bits_in
from tests.support.twins import layers, layers_loss

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")

THRESHOLD = 1.0
SCALES = (0.3, 3.0, 10.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""
STEPS = 20

Make = Callable[[list[nn.Parameter]], Any]


def module_of(name: str) -> ModuleType:
    package = name.split(".")[0]
    pytest.importorskip(package, reason=f"there is no {package}")
    return importlib.import_module(name)


def made(module: str, name: str, given: Make = lambda parameters: parameters, **options) -> Make:
    """Return a function that makes an optimizer of a package, of what is given to it."""
    return lambda parameters: getattr(module_of(module), name)(given(parameters), **options)


def grouped(weights: list[nn.Parameter]) -> Any:
    """Return the groups that Muon takes."""
    return [{"params": weights[:2], "use_muon": True}, {"params": weights[2:], "use_muon": False}]


SGD = {"lr": 0.05, "momentum": 0.9}
bits8 = partial(made, "bitsandbytes.optim", lr=1e-3, min_8bit_size=1)
muon = partial(made, "pytorch_optimizer", given=grouped, lr=0.02)
around = partial(made, "pytorch_optimizer", given=lambda ps: torch.optim.SGD(ps, **SGD))
sharpness_aware = partial(made, "pytorch_optimizer", base_optimizer=torch.optim.SGD, **SGD)

ALIKE = ("Shampoo", "Kron", "AdEMAMix", "MARS", "Adan", "CAME")
BITS8 = (
    *("Adam8bit", "AdamW8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit"),
    *("AdEMAMix8bit", "PagedAdamW8bit"),
)
OPTIMIZERS: dict[str, Make] = {
    "AdamWScheduleFree": made("schedulefree", "AdamWScheduleFree", lr=0.01, foreach=True),
    "AdamWScheduleFree loop": made("schedulefree", "AdamWScheduleFree", lr=0.01, foreach=False),
    "SGDScheduleFree": made("schedulefree", "SGDScheduleFree", lr=0.05, warmup_steps=3),
    "RAdamScheduleFree": made("schedulefree", "RAdamScheduleFree", lr=0.01),
    "Lion": made("lion_pytorch", "Lion", lr=1e-3, weight_decay=0.1),
    "Lion decoupled": made("lion_pytorch", "Lion", lr=1e-3, decoupled_weight_decay=True),
    **{name: muon(name) for name in ("Muon", "AdaMuon")},
    "SOAP": made("pytorch_optimizer", "SOAP", lr=3e-3, precondition_frequency=5),
    "Prodigy": made("pytorch_optimizer", "Prodigy", lr=1.0),
    **{name: made("pytorch_optimizer", name, lr=1e-3) for name in ALIKE},
    **{name: bits8(name) for name in BITS8},
    "SGD8bit": bits8("SGD8bit", momentum=0.9),
}
WRAPPERS = {name: around(name) for name in ("Lookahead", "OrthoGrad")}
WITH_CLOSURE: dict[str, Make] = {
    "AdamWScheduleFreeClosure": made("schedulefree", "AdamWScheduleFreeClosure", lr=0.01),
    "SGDScheduleFreeClosure": made("schedulefree", "SGDScheduleFreeClosure", lr=0.05),
    **{name: sharpness_aware(name) for name in ("SAM", "LookSAM", "FriendlySAM")},
}


def seed_numpy_too(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002  # whose global state an optimizer uses


class OutsideRun:
    """Two layers in training, with an optimizer of some package."""

    def __init__(self, make: Make) -> None:
        self.parameters = layers(3)
        seed_numpy_too(0)
        self.optimizer = make(self.parameters)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # as those without a schedule want it

    def backward(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        loss = layers_loss(step, self.parameters, SCALES[step % len(SCALES)])
        loss.backward()
        return loss

    def take(self, step: int, *, threshold: float = math.inf) -> None:
        """Take a step, after clipping by hand where there is a threshold."""
        self.backward(step)
        clip_grad_norm_(self.parameters, threshold)
        seed_numpy_too(step)  # some draw random numbers in their steps
        self.optimizer.step()

    def values(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def snapshot(self) -> Any:
        """Return parameters, gradients, groups and state of the optimizer, bit for bit."""
        groups = [{**group, "params": None} for group in self.optimizer.param_groups]
        state = [self.optimizer.state.get(p) for p in self.parameters]
        return bits_in([(p.detach(), p.grad) for p in self.parameters] + [groups, state])


def clip_inner(run: OutsideRun) -> Any:
    """Clip at each step of the optimizer inside, which is returned."""
    inner = run.optimizer
    for name in ("optimizer", "base_optimizer"):
        if isinstance(getattr(inner, name, None), torch.optim.Optimizer):
            inner = getattr(inner, name)
            inner.register_step_pre_hook(lambda *_: clip_grad_norm_(run.parameters, 1.0) and None)
    return inner


def assert_twins(clipper: GradientClipper, ours: OutsideRun, theirs: OutsideRun) -> None:
    assert clipper.steps - clipper.skipped == STEPS
    assert 0.2 < clipper.clip_rate() < 0.8
    assert torch.equal(ours.values(), theirs.values())


@pytest.mark.filterwarnings("ignore:.*Muon with use_muon=True shares a norm with")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name):
    """They equal those clipped by hand, in parameters and state; skipped ones change nothing."""
    ours, theirs, free = (OutsideRun(OPTIMIZERS[name]) for _ in range(3))
    clipper = GradientClipper(ours.optimizer, THRESHOLD, nonfinite="skip")
    for step in range(STEPS):
        if step in (0, 3):  # before there is any state, and in the middle
            ours.backward(step)
            ours.parameters[1].grad[0, 0] = math.nan
            before = ours.snapshot()
            seed_numpy_too(step)
            ours.optimizer.step()
            assert ours.snapshot() == before
        ours.take(step)
        theirs.take(step, threshold=THRESHOLD)
        free.take(step)
    assert clipper.skipped == 2
    assert_twins(clipper, ours, theirs)
    assert ours.snapshot() == theirs.snapshot()
    assert not torch.equal(ours.values(), free.values())


@pytest.mark.parametrize("name", [*WRAPPERS, *WITH_CLOSURE])
def test_wrappers_and_closures(name):
    """The optimizer inside is clipped, at every evaluation of a closure."""
    make, closes = (WRAPPERS | WITH_CLOSURE)[name], name in WITH_CLOSURE
    ours, theirs = OutsideRun(make), OutsideRun(make)
    clipper = GradientClipper(ours.optimizer, THRESHOLD)
    wraps = clip_inner(theirs) is not theirs.optimizer
    assert wraps or closes

    def evaluated(run: OutsideRun, step: int) -> Tensor:
        loss = run.backward(step)
        if run is theirs and not wraps:
            clip_grad_norm_(run.parameters, THRESHOLD)
        return loss

    for step in range(STEPS):
        for run in (ours, theirs):
            if closes:
                run.backward(step)
                run.optimizer.step(lambda run=run, step=step: evaluated(run, step))
            else:
                run.take(step)
    assert_twins(clipper, ours, theirs)


def test_an_optimizer_that_clips_too():
    """It gets a warning."""
    module_of("pytorch_optimizer")
    run = OutsideRun(made("pytorch_optimizer", "Lamb"))
    with pytest.warns(UserWarning, match="Lamb clips by itself with max_grad_norm=1.0"):
        GradientClipper(run.optimizer, THRESHOLD)


def test_a_wrapper_that_is_no_optimizer():
    """It is refused, and the optimizer inside is not."""
    inner = partial(torch.optim.SGD, lr=0.05)
    make = made("schedulefree", "ScheduleFreeWrapper", inner, momentum=0.9)
    ours, theirs = OutsideRun(make), OutsideRun(make)
    with pytest.raises(AttachError, match="Found a ScheduleFreeWrapper"):
        GradientClipper(ours.optimizer, THRESHOLD)
    clipper = GradientClipper(ours.optimizer.base, THRESHOLD)
    for step in range(STEPS):
        ours.take(step)
        theirs.take(step, threshold=THRESHOLD)
    assert_twins(clipper, ours, theirs)


# DeepSpeed, which is not installed here: its classes by their modules and names

DEEPSPEED = {
    "DeepSpeedEngine": "runtime.engine",
    "PipelineEngine": "runtime.pipe.engine",
    "DeepSpeedHybridEngine": "runtime.hybrid_engine",
    "DeepSpeedZeroOptimizer": "runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer_Stage3": "runtime.zero.stage3",
    "BF16_Optimizer": "runtime.bf16_optimizer",
    "FP16_Optimizer": "runtime.fp16.fused_optimizer",
    "WarmupLR": "runtime.lr_schedules",
}
refused = partial(pytest.raises, AttachError)


def holding(optimizer: Any, name: str = "", attribute: str = "optimizer", base: Any = None) -> Any:
    """Return an object of a class of DeepSpeed, or of another wrapper, that holds an optimizer."""
    base = base or (nn.Module if name.endswith("Engine") else object)
    module = f"deepspeed.{DEEPSPEED[name]}" if name else "mine"
    wrapper = type(name or "Wrapper", (base,), {"__module__": module})()
    setattr(wrapper, attribute, optimizer)
    return wrapper


def one_sgd(kind: Any = torch.optim.SGD) -> torch.optim.Optimizer:
    return kind([nn.Parameter(torch.zeros(2))], lr=0.1)


@pytest.mark.parametrize("name", [name for name in DEEPSPEED if name != "WarmupLR"])
def test_deepspeed(name):
    """Its engines and optimizers are refused with the reason, inside of wrappers and derived."""
    held = holding(one_sgd(), name)
    derived = holding(one_sgd(), base=type(held))
    wrapper = holding(held, attribute="engine")
    for given in (held, derived, wrapper, holding(held), [one_sgd(), holding(held)]):
        with refused(match=rf"({name}|Wrapper) of DeepSpeed, .* gradient_clipping"):
            GradientClipper(given, 1.0)
    assert "deepspeed" not in sys.modules


def test_an_optimizer_in_deepspeed(monkeypatch):
    """It is refused while DeepSpeed holds it; a scheduler that holds it is no obstacle."""
    kind = type("FusedAdam", (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    zero = holding(optimizer := one_sgd(kind), "DeepSpeedZeroOptimizer")
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    with refused(match="DeepSpeedZeroOptimizer .* gradient_clipping"):
        GradientClipper(optimizer, 1.0)
    del zero
    scheduler = holding(optimizer, "WarmupLR")
    GradientClipper(scheduler.optimizer, 1.0)
