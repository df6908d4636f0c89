"""A step on a device reads no value on the host: whatever would read one raises here."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import gradclip
from gradclip import GradientClipper


@pytest.fixture
def unread(tape):
    """A block in which no way leads to a value: neither one the tape sees, nor another."""

    @contextmanager
    def block():
        with pytest.MonkeyPatch.context() as patch, tape:
            for name in ("tolist", "numpy"):
                patch.setattr(torch.Tensor, name, refusing(getattr(torch.Tensor, name)))
            yield

    return block


def refusing(way):
    def refuse(tensor, *args):
        assert not tensor.is_floating_point(), "the host would wait for a value"
        return way(tensor, *args)

    return refuse


def training(max_norm, fused: bool, **options):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    kind = torch.optim.AdamW if fused else torch.optim.SGD  # others read their count of steps
    optimizer = kind(model.parameters(), lr=0.01, fused=fused)
    clipper = GradientClipper(optimizer, max_norm, log=gradclip.MemorySink(), **options)

    def step(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        model(torch.randn(5, 4) * factor).square().mean().backward()
        optimizer.step()

    return step, clipper


@pytest.mark.parametrize("rule", ["Fixed", "Percentile"], indirect=True)
def test_no_policy_waits(rule, options, unread):
    step, clipper = training(rule(), fused=True, **options)
    for _ in range(3):  # the first makes what is kept on the device
        step()
    with unread():
        for factor in (1.0, 100.0, float("nan"), 1.0):
            step(factor)
    assert clipper.steps == 7


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_no_threshold_waits(rule, scope, unread):
    step, clipper = training(rule(), fused=False, scope=scope)
    for _ in range(3):
        step()
    with unread():
        for factor in (1.0, 100.0, float("nan"), 1.0):
            step(factor)
    assert clipper.steps == 7


@pytest.mark.parametrize(
    ("fused", "options"),
    [(True, {"nonfinite": "raise"}), (False, {"nonfinite": "skip"}), (False, {"exceed": "skip"})],
)
def test_what_says_that_it_waits_does(fused, options, unread):
    step, _ = training(0.5, fused=fused, **options)
    for _ in range(3):
        step()
    with unread(), pytest.raises(AssertionError, match="the host would wait for a value"):
        step()


def test_plain_functions_do_not_wait(unread):
    weights = [nn.Parameter(torch.ones(3, 4)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.ones(3, 4)
    gradclip.clip_grad_units_(weights)  # keeps where units are
    with unread():
        gradclip.clip_grad_norm_(weights, 1.0)
        gradclip.clip_gradients_([torch.ones(3)], 1.0)
        gradclip.clip_grad_value_(weights, 1.0)
        norm = gradclip.get_total_norm([weight.grad for weight in weights])
        gradclip.clip_grads_with_norm_(weights, 1.0, norm)
        gradclip.clip_grad_units_(weights)
        gradclip.clip_backward(weights[0] * 1, 1.0, 0.5).sum().backward()
