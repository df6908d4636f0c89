"""Optimizers of other packages, against the same steps clipped by hand, bit for bit."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradclip import AttachError, GradientClipper, clip_grad_norm_

pytestmark = [
    # bitsandbytes, of its paged optimizers:
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

THRESHOLD = 1.0
SCALES = (0.3, 3.0, 10.0)
"""By what losses are multiplied, in turn, so that some gradients are too long and some are not."""
STEPS = 20

Make = Callable[[list[nn.Parameter]], Any]


def module_of(name: str) -> ModuleType:
    pytest.importorskip(name, reason=f"there is no {name}")
    return importlib.import_module(name)


def made(module: str, name: str, **options: Any) -> Make:
    """Return a function that makes an optimizer of a package."""
    return lambda parameters: getattr(module_of(module), name)(parameters, **options)


def bits8(name: str, **options: Any) -> Make:
    """Return a function that makes an optimizer with its state in 8 bits."""
    return lambda parameters: getattr(module_of("bitsandbytes").optim, name)(
        parameters, lr=1e-3, min_8bit_size=1, **options
    )


def muon(name: str) -> Make:
    def make(parameters: list[nn.Parameter]) -> Any:
        matrices, bias = parameters[:2], parameters[2:]
        groups = [{"params": matrices, "use_muon": True}, {"params": bias, "use_muon": False}]
        return made("pytorch_optimizer", name, lr=0.02)(groups)

    return make


def around(name: str) -> Make:
    """Return a function that makes a wrapper around SGD."""
    return lambda parameters: made("pytorch_optimizer", name)(
        torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    )


def sharpness_aware(name: str) -> Make:
    return made("pytorch_optimizer", name, base_optimizer=torch.optim.SGD, lr=0.05, momentum=0.9)


OPTIMIZERS: dict[str, Make] = {
    "AdamWScheduleFree": made("schedulefree", "AdamWScheduleFree", lr=0.01, foreach=True),
    "AdamWScheduleFree loop": made("schedulefree", "AdamWScheduleFree", lr=0.01, foreach=False),
    "SGDScheduleFree": made("schedulefree", "SGDScheduleFree", lr=0.05, warmup_steps=3),
    "RAdamScheduleFree": made("schedulefree", "RAdamScheduleFree", lr=0.01),
    "Lion": made("lion_pytorch", "Lion", lr=1e-3, weight_decay=0.1),
    "Lion decoupled": made("lion_pytorch", "Lion", lr=1e-3, decoupled_weight_decay=True),
    "Muon": muon("Muon"),
    "AdaMuon": muon("AdaMuon"),
    "SOAP": made("pytorch_optimizer", "SOAP", lr=3e-3, precondition_frequency=5),
    "Shampoo": made("pytorch_optimizer", "Shampoo", lr=1e-3),
    "Kron": made("pytorch_optimizer", "Kron", lr=1e-3),
    "AdEMAMix": made("pytorch_optimizer", "AdEMAMix", lr=1e-3),
    "Prodigy": made("pytorch_optimizer", "Prodigy", lr=1.0),
    "MARS": made("pytorch_optimizer", "MARS", lr=1e-3),
    "Adan": made("pytorch_optimizer", "Adan", lr=1e-3),
    "CAME": made("pytorch_optimizer", "CAME", lr=1e-3),
    "Adam8bit": bits8("Adam8bit"),
    "AdamW8bit": bits8("AdamW8bit"),
    "Lion8bit": bits8("Lion8bit"),
    "SGD8bit": bits8("SGD8bit", momentum=0.9),
    "RMSprop8bit": bits8("RMSprop8bit"),
    "Adagrad8bit": bits8("Adagrad8bit"),
    "AdEMAMix8bit": bits8("AdEMAMix8bit"),
    "PagedAdamW8bit": bits8("PagedAdamW8bit"),
}
WRAPPERS: dict[str, Make] = {
    "Lookahead": around("Lookahead"),
    "OrthoGrad": around("OrthoGrad"),
}
WITH_CLOSURE: dict[str, Make] = {
    "AdamWScheduleFreeClosure": made("schedulefree", "AdamWScheduleFreeClosure", lr=0.01),
    "SGDScheduleFreeClosure": made("schedulefree", "SGDScheduleFreeClosure", lr=0.05),
    "SAM": sharpness_aware("SAM"),
    "LookSAM": sharpness_aware("LookSAM"),
    "FriendlySAM": sharpness_aware("FriendlySAM"),
}


def seed_numpy_too(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002  # whose global state an optimizer uses


class OutsideRun:
    """A small network in training, with an optimizer of some package."""

    def __init__(self, make: Make) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = [(16, 32), (32, 8), (8,)]
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=generator) * 0.3) for shape in shapes
        ]
        seed_numpy_too(0)
        self.optimizer = make(self.parameters)
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # as those without a schedule want it

    def backward(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 16, generator=generator)
        wanted = torch.randn(8, 8, generator=generator)
        inner, outer, bias = self.parameters
        self.optimizer.zero_grad()
        found = (inputs @ inner).tanh() @ outer + bias
        loss = (found - wanted).square().mean() * SCALES[step % len(SCALES)]
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

    def snapshot(self) -> str:
        """Return parameters, gradients, groups and state of the optimizer as text, exactly."""
        torch.set_printoptions(threshold=sys.maxsize, precision=17)
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        state = [self.optimizer.state.get(p, {}) for p in self.parameters]
        tensors = [(p.detach(), p.grad) for p in self.parameters]
        text = repr((tensors, groups, [exact(each) for each in state]))
        torch.set_printoptions(profile="default")
        return text


def exact(state: Any) -> Any:
    """Return a state without what has no text of its own."""
    if isinstance(state, dict):
        return {name: exact(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [exact(value) for value in state]
    return state if isinstance(state, Tensor | int | float | bool | None) else type(state)


def clip_inner(run: OutsideRun) -> Any:
    """Clip at each step of the optimizer inside, which is returned."""
    inner = run.optimizer
    for name in ("optimizer", "base_optimizer"):
        if isinstance(getattr(inner, name, None), torch.optim.Optimizer):
            inner = getattr(inner, name)
            inner.register_step_pre_hook(lambda *_: clip_grad_norm_(run.parameters, 1.0) and None)
    return inner


def assert_twins(clipper: GradientClipper, ours: OutsideRun, theirs: OutsideRun) -> None:
    assert clipper.steps == STEPS
    assert 0.2 < clipper.clip_rate() < 0.8
    assert torch.equal(ours.values(), theirs.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps(name):
    """They equal those clipped by hand, in parameters and state."""
    ours, theirs, free = (OutsideRun(OPTIMIZERS[name]) for _ in range(3))
    clipper = GradientClipper(ours.optimizer, THRESHOLD)
    for step in range(STEPS):
        ours.take(step)
        theirs.take(step, threshold=THRESHOLD)
        free.take(step)
    assert_twins(clipper, ours, theirs)
    assert ours.snapshot() == theirs.snapshot()
    assert not torch.equal(ours.values(), free.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps(name):
    """They leave parameters and state as they are."""
    ours, without = OutsideRun(OPTIMIZERS[name]), OutsideRun(OPTIMIZERS[name])
    clipper = GradientClipper(ours.optimizer, 1e4, nonfinite="skip")
    for step in range(6):
        if step in (0, 3):  # before there is any state, and in the middle
            ours.backward(step)
            ours.parameters[1].grad[0, 0] = math.nan
            before = ours.snapshot()
            seed_numpy_too(step)
            ours.optimizer.step()
            assert ours.snapshot() == before
        else:
            ours.take(step)
            without.take(step)
    assert (clipper.skipped, clipper.steps) == (2, 6)
    assert torch.equal(ours.values(), without.values())


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
    wrapper = module_of("schedulefree").ScheduleFreeWrapper

    def make(parameters: list[nn.Parameter]) -> Any:
        return wrapper(torch.optim.SGD(parameters, lr=0.05), momentum=0.9)

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
    "DeepSpeedEngine": "deepspeed.runtime.engine",
    "PipelineEngine": "deepspeed.runtime.pipe.engine",
    "DeepSpeedHybridEngine": "deepspeed.runtime.hybrid_engine",
    "DeepSpeedZeroOptimizer": "deepspeed.runtime.zero.stage_1_and_2",
    "DeepSpeedZeroOptimizer_Stage3": "deepspeed.runtime.zero.stage3",
    "BF16_Optimizer": "deepspeed.runtime.bf16_optimizer",
    "FP16_Optimizer": "deepspeed.runtime.fp16.fused_optimizer",
}


def of_deepspeed(name: str, optimizer: Any, base: type = object) -> Any:
    """Return an object of a class that looks like one of DeepSpeed's, and holds an optimizer."""
    found = type(name, (base,), {"__module__": DEEPSPEED.get(name, "deepspeed.ops.adam")})()
    found.optimizer = optimizer
    return found


def one_sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


def holding(optimizer: Any, name: str = "Wrapper", attribute: str = "optimizer") -> Any:
    """Return a wrapper, such as Accelerate's, or a scheduler."""
    modules = {"WarmupLR": "deepspeed.runtime.lr_schedules"}
    wrapper = type(name, (), {"__module__": modules.get(name, "mine")})()
    setattr(wrapper, attribute, optimizer)
    return wrapper


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name):
    """Its engines and optimizers are refused with the reason."""
    base = nn.Module if name.endswith("Engine") else object
    with pytest.raises(AttachError, match=f"{name} .* gradient_clipping"):
        GradientClipper(of_deepspeed(name, one_sgd(), base), 1.0)
    assert "deepspeed" not in sys.modules


def test_deepspeed_inside():
    """It is found inside of wrappers and by base classes."""
    zero = of_deepspeed("DeepSpeedZeroOptimizer", one_sgd())
    engine = of_deepspeed("DeepSpeedEngine", zero, nn.Module)
    derived = type("Own", (type(engine),), {"__module__": "mine"})()
    derived.optimizer = zero
    wrapper = holding(engine, attribute="engine")
    for given in (engine, derived, wrapper, holding(zero), [one_sgd(), holding(zero)]):
        with pytest.raises(AttachError, match="gradient_clipping"):
            GradientClipper(given, 1.0)


def test_an_optimizer_in_deepspeed(monkeypatch):
    """It is refused while DeepSpeed holds it; a scheduler that holds it is no obstacle."""
    kind = type("FusedAdam", (torch.optim.SGD,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    optimizer = kind([nn.Parameter(torch.zeros(2))], lr=0.1)
    zero = of_deepspeed("DeepSpeedZeroOptimizer", optimizer)
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    with pytest.raises(AttachError, match="DeepSpeedZeroOptimizer .* gradient_clipping"):
        GradientClipper(optimizer, 1.0)
    del zero
    scheduler = holding(optimizer, "WarmupLR")
    GradientClipper(scheduler.optimizer, 1.0)
