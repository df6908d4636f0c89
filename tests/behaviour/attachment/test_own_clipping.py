"""Optimizers that clip in their own step: the log shows the norm before and what it became."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from gradclip import GradientClipper, MemorySink
from gradclip.thresholds import Percentile
from tests.support.reference import norm_of

FACTORS = [1.0, 0.5]


class Clipping(SGD):
    """Clips to 0.5 before it steps."""

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 0.5)
        return super().step(closure)


class Weighing(SGD):
    """Changes gradients in a way that is no clipping."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = parameter.grad * torch.tensor(FACTORS)
        return super().step(closure)


def two_weights(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    both = [nn.Parameter(torch.zeros(2, dtype=dtype)) for _ in range(2)]
    both[0].grad, both[1].grad = (
        torch.tensor([3.0, 0.0]).to(dtype),
        torch.tensor([0.0, 4.0]).to(dtype),
    )
    return both


@pytest.mark.parametrize("others", [[], [SGD], [Clipping], [AdamW, SGD]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.1, 1.0, None])
def test_the_norm_before_and_what_it_became(max_norm, dtype, others):
    """Whatever optimizers the process has made before."""
    for kind in others:
        kind(two_weights(), lr=1.0)
    held, sink = two_weights(dtype), MemorySink(per_parameter="all")
    optimizer = Clipping(held, lr=1.0)
    clipper = GradientClipper(optimizer, max_norm, log=sink)
    optimizer.step()
    became = 0.1 if max_norm == 0.1 else 0.5
    clipper.close()
    [row] = sink.steps
    tolerance = 2.0**-7 if dtype is torch.bfloat16 else 2e-6  # of torch's own clipping
    assert row.norm == pytest.approx(5.0, rel=1e-6)
    assert row.clipped_norm == pytest.approx(became, rel=tolerance)
    assert [*row.parameter_norms.values()] == pytest.approx([3.0, 4.0], rel=tolerance)
    assert norm_of(held) == pytest.approx(became, rel=tolerance)
    assert row.clip_rate == 1.0


def test_a_rule_learns_from_the_norm_before():
    held = two_weights()
    optimizer = Clipping(held, lr=1.0)
    clipper = GradientClipper(optimizer, Percentile(50), scope="parameter")
    optimizer.step()
    assert clipper.last.threshold.tolist() == pytest.approx([3.0, 4.0])
    assert norm_of(held) == pytest.approx(0.5, rel=1e-5)


def test_other_changes_are_no_clipping():
    """Their norm is that of the gradients that the parent's step takes."""
    optimizer = Weighing(two_weights(), lr=1.0)
    clipper = GradientClipper(optimizer, 100.0)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx((3.0**2 + 2.0**2) ** 0.5)
    assert clipper.last.coefficient.item() == 1.0


def replaced_class() -> SGD:
    optimizer = SGD(two_weights(), lr=1.0)
    optimizer.__class__ = type("Other", (Clipping,), {"step": Clipping.__dict__["step"]})
    return optimizer


def replaced_step() -> SGD:
    kind = type("Other", (SGD,), {})
    optimizer = kind(two_weights(), lr=1.0)
    kind.step = lambda self, closure=None: SGD.step(self, closure)
    return optimizer


def subclass_made_now() -> SGD:
    optimizer = SGD(two_weights(), lr=1.0)
    optimizer.__class__ = type("Fresh", (SGD,), {"step": lambda self: SGD.step(self)})
    return optimizer


@pytest.mark.parametrize("make", [replaced_class, replaced_step, subclass_made_now])
def test_a_class_or_step_that_was_replaced_is_clipped(make):
    """Before the clipper is attached; nothing has made it call the hooks."""
    optimizer = make()
    held = optimizer.param_groups[0]["params"]
    clipper = GradientClipper(optimizer, 0.1)
    optimizer.step()
    assert clipper.steps == 1
    assert clipper.last.norm.item() == pytest.approx(5.0, rel=2e-6)
    assert clipper.last.clipped_norm.item() == pytest.approx(0.1, rel=2e-6)
    assert norm_of(held) == pytest.approx(0.1, rel=1e-5)
