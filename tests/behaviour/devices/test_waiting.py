"""A step on a device reads no value on the host: whatever would read one raises here."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import gradclip
from gradclip import GradientClipper
from tests.support.reference import parameter_with


@pytest.fixture(params=["like a device", pytest.param("cuda", marks=pytest.mark.cuda)])
def target(request) -> torch.device:
    if request.param == "cuda":
        return torch.device("cuda")
    request.getfixturevalue("like_a_device")
    return torch.device("cpu")


@contextmanager
def sync_raises():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def reading_raises(tape):
    def refusing(method):
        def refuse(tensor, *args):
            assert not tensor.is_floating_point(), "the host would wait for a value"
            return method(tensor, *args)

        return refuse

    with pytest.MonkeyPatch.context() as patch, tape:
        for name in ("tolist", "numpy"):  # which the tape does not see
            patch.setattr(torch.Tensor, name, refusing(getattr(torch.Tensor, name)))
        yield


@pytest.fixture
def unread(target, request):
    """A block in which a host that waits for a value raises."""
    if target.type == "cuda":
        return sync_raises()
    return reading_raises(request.getfixturevalue("tape"))


def trained_steps(target, max_norm, *, fused: bool, **options):
    """Return a clipper, and a function that takes steps; three steps have been taken."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(target)
    kind = torch.optim.AdamW if fused else torch.optim.SGD  # others read their count of steps
    optimizer = kind(model.parameters(), lr=0.01, fused=fused)
    # On a device a batch is read once its copy has arrived; here it would be read at once.
    sink = gradclip.MemorySink(flush_every=2 if target.type == "cuda" else 100)
    clipper = GradientClipper(optimizer, max_norm, log=sink, **options)
    batches = {factor: torch.randn(5, 4, device=target) * factor for factor in FACTORS}

    def take(*factors: float) -> None:
        for factor in factors:
            optimizer.zero_grad()
            loss = model(batches[factor]).square().mean()
            loss.backward()
            clipper.loss = loss
            optimizer.step()

    take(0.01, 0.01, 0.01)  # a step that is not skipped makes the state
    return take, clipper


FACTORS = (1.0, 100.0, float("nan"), 0.01)


@pytest.mark.parametrize("rule", ["Fixed", "Percentile"], indirect=True)
def test_no_policy_waits(target, rule, options, unread):
    take, clipper = trained_steps(target, rule(), fused=True, **options)
    with unread:
        take(*FACTORS)
    assert clipper.steps == 7


@pytest.mark.parametrize(
    "scope", ["global", "group", "parameter", "unit", lambda name, p: range(len(p))]
)
def test_no_threshold_waits(target, rule, scope, unread):
    take, clipper = trained_steps(target, rule(), fused=False, scope=scope)
    with unread:
        take(*FACTORS)
    assert clipper.steps == 7


@pytest.mark.parametrize(
    ("fused", "options"),
    [(True, {"nonfinite": "raise"}), (False, {"nonfinite": "skip"}), (False, {"exceed": "skip"})],
)
def test_what_says_that_it_waits_does(target, fused, options, unread):
    take, _ = trained_steps(target, 0.5, fused=fused, **options)
    reason = "would wait for a value|synchronizing"
    with unread, pytest.raises((AssertionError, RuntimeError), match=reason):
        take(1.0)


def test_functions_do_not_wait(target, unread):
    weights = [nn.Parameter(torch.ones(size, device=target)) for size in (3, 500, 70_000)]
    weights.append(nn.Parameter(torch.ones(9, 70, device=target)[:, ::2]))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    gradclip.clip_grad_units_(weights)  # keeps where units are
    with unread:
        gradclip.clip_grad_norm_(weights, 1.0)
        gradclip.clip_gradients_([weight.grad for weight in weights], 1.0, 3.0)
        gradclip.clip_grad_value_(weights, 1e-4)
        norm = gradclip.get_total_norm([weight.grad for weight in weights])
        gradclip.clip_grads_with_norm_(weights, 1.0, norm)
        gradclip.clip_grad_units_(weights)
        gradclip.clip_backward(weights[0] * 1, 1.0, 0.5).sum().backward()


@pytest.mark.usefixtures("like_a_device")
def test_torch_operators_on_a_device_multiply_also_by_1():
    """They need not wait for the coefficient then."""
    weight = parameter_with(torch.tensor([0.6, 0.8 + 2**-20]))
    bits, version = weight.grad.clone(), weight.grad._version
    GradientClipper(torch.optim.SGD([weight], lr=0.0), 5.0).step()
    assert weight.grad._version > version
    assert torch.equal(weight.grad, bits)
