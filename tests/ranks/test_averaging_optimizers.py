"""Optimizers that average gradients over processes before they step."""

import math
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.optim import SGD, Adam, Optimizer

from gradclip import GradientClipper
from tests.support.processes import on_ranks

THRESHOLD = 0.5


def average(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()


class Averaging(SGD):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        average(self)
        super().step()
        return loss


class Replacing(SGD):
    """Averages into new gradients."""

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad.clone()
        average(self)
        SGD.step(self)
        return loss


class Mixin:
    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.synchronize()
        self.step_parent()
        return loss

    def synchronize(self):
        average(self)

    def step_parent(self):
        super().step()


class Mixed(Mixin, Adam):
    pass


class Base(SGD):
    """Of which no optimizer is built, so that torch lets its own step call no hooks."""

    def step(self, closure=None):
        return super().step(closure)


class Derived(Base):
    def step(self, closure=None):
        loss = None if closure is None else closure()
        average(self)
        super().step()
        return loss


def like_horovod(parameters: Any, lr: float) -> Optimizer:
    """Return an optimizer of a class that is made for it, as Horovod does."""

    class Methods:
        def step(self, closure=None):
            loss = None if closure is None else closure()
            average(self)
            super(self.__class__, self).step()
            return loss

    return type("SGD", (SGD,), {"step": Methods.step})(parameters, lr=lr)


class AveragingWrapper(Optimizer):
    """An optimizer with hooks of its own that steps another one."""

    def __init__(self, parameters, lr):
        self.optim = SGD(parameters, lr=lr)
        super().__init__(self.optim.param_groups, {})
        self.param_groups = self.optim.param_groups

    def step(self, closure=None):
        loss = None if closure is None else closure()
        average(self)
        self.optim.step()
        return loss


class Holder:
    """No optimizer at all, and has one."""

    def __init__(self, parameters, lr):
        self.optimizer = SGD(parameters, lr=lr)

    step = AveragingWrapper.step
    optim = property(lambda self: self.optimizer)
    param_groups = property(lambda self: self.optimizer.param_groups)


KINDS = {
    "in its step": Averaging,
    "into new gradients": Replacing,
    "in a mixin": Mixed,
    "in a class of two levels": Derived,
    "as Horovod does": like_horovod,
    "around an optimizer": AveragingWrapper,
    "around an optimizer, without hooks": Holder,
}


def drawn_gradients(step: int, rank: int) -> list[torch.Tensor]:
    """Return the gradients of a rank: on rank 0 much longer, and pointing elsewhere."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(shape, generator=generator) * 10 ** (1 - rank) for shape in (3, (2, 2))]


def averaged(step: int, size: int) -> list[torch.Tensor]:
    by_rank = [drawn_gradients(step, rank) for rank in range(size)]
    return [sum(parts) / size for parts in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["step()", "step(closure)"])
@on_ranks("two_ranks")
def test_gradients_are_clipped_after_they_are_averaged(kind, call):
    """All ranks clip the average by its norm, and end with the same parameters."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in (3, (2, 2))]
    optimizer = KINDS[kind](parameters, lr=0.1)
    clipper = GradientClipper(optimizer, THRESHOLD)
    for step in range(3):
        local = drawn_gradients(step, distributed.get_rank())
        needed = averaged(step, distributed.get_world_size())

        def closure(local=local):
            for parameter, gradient in zip(parameters, local, strict=True):
                parameter.grad = gradient
            return 1.0

        if call == "step()":
            closure()
            optimizer.step()
        else:
            assert optimizer.step(closure) == 1.0
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in needed))
        assert norm > THRESHOLD
        assert clipper.last.norm.item() == pytest.approx(norm)
        for parameter, each in zip(parameters, needed, strict=True):
            torch.testing.assert_close(parameter.grad, each * (THRESHOLD / norm))
    assert clipper.steps == 3
    ends = [torch.zeros_like(parameters[0]) for _ in range(distributed.get_world_size())]
    distributed.all_gather(ends, parameters[0].detach())
    assert all(torch.equal(end, ends[0]) for end in ends)


@on_ranks("two_ranks")
def test_a_nan_of_one_rank_is_skipped_by_all():
    """The average is NaN on all ranks, so parameters, state and counters stay on all of them."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = Averaging([weight], lr=0.1, momentum=0.9)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="skip")
    weight.grad = torch.full((3,), math.nan if distributed.get_rank() else 1.0)
    optimizer.step()
    assert weight.tolist() == [1.0] * 3
    assert not optimizer.state[weight]
    assert clipper.skipped == clipper.steps == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:When period is 1")
@on_ranks("two_ranks")
def test_parameters_that_are_averaged_after_a_local_step():
    """Each rank clips its own gradients, as it steps with them."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    weight = nn.Parameter(torch.zeros(2))
    averager = PeriodicModelAverager(period=1, warmup_steps=0)
    optimizer = PostLocalSGDOptimizer(SGD([weight], lr=1.0), averager)
    clipper = GradientClipper(optimizer, 1.0)
    rank = distributed.get_rank()
    weight.grad = torch.tensor([[3.0, 4.0], [0.3, 0.4]][rank])
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx([5.0, 0.5][rank])
    assert weight.tolist() == pytest.approx([-0.45, -0.6])
