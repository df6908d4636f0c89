"""Devices that have no float64, such as MPS, with the CPU in their place."""

import math
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradclip
from gradclip import GradientClipper
from gradclip.engines.operators import device

WIDE = (torch.float64, torch.complex128)


class NoFloat64(TorchDispatchMode):
    """Refuses float64, as such a device does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            assert getattr(tensor, "dtype", None) not in WIDE, f"{function} made float64"
        return made


@pytest.fixture
def narrow(tape, monkeypatch):
    for name, module in [*sys.modules.items()]:
        if name.startswith("gradclip.") and hasattr(module, "norm_dtype"):
            monkeypatch.setattr(module, "norm_dtype", lambda device: torch.float32)
    with NoFloat64():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
@pytest.mark.parametrize("size", [1.0, 1e20, 1e-25])
def test_norms_are_as_true_as_float32_allows(dtype, order, size, narrow):
    if dtype is torch.float16:
        size = {1.0: 1.0, 1e20: 1e4, 1e-25: 1e-6}[size]
    values = (torch.rand(300) * size).to(dtype)
    given = [values[:200], torch.zeros(3, dtype=dtype), torch.empty(0, dtype=dtype), values[200:]]
    exact = [value / size for value in values.tolist()]
    if order == math.inf:
        needed = max(exact)
    else:
        needed = math.fsum(value**order for value in exact) ** (1 / order)
    found = device.norm(given, order)
    assert (found.shape, found.dtype) == ((1,), torch.float32)
    assert found.item() == pytest.approx(needed * size, rel=2e-6, abs=0)
    for value in (math.nan, math.inf):
        norm = device.norm([torch.tensor([1.0, value]), torch.ones(2)], order).item()
        assert norm == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_the_plain_functions_do_without_float64(order, narrow):
    weights = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    for weight in weights:
        weight.grad = torch.full((4, 3), -1e20)
    norm = gradclip.clip_grad_norm_(weights, 2.0, order)
    assert norm.dtype is torch.float32
    after = gradclip.get_total_norm([weight.grad for weight in weights], order)
    assert after.item() == pytest.approx(2.0)
    gradclip.clip_grads_with_norm_(weights, 1.0, after)
    gradclip.clip_grad_value_(weights, 1e-3)
    assert weights[0].grad.abs().max().item() == pytest.approx(1e-3)
    gradclip.clip_grad_units_(weights)
    gradclip.clip_backward(weights[0] * 1, 1.0, 0.5).sum().backward()
    complex_one = torch.full((3,), 3 + 4j)
    assert gradclip.get_total_norm([complex_one], 1.0).item() == pytest.approx(15.0)


@pytest.mark.parametrize("scope", ["global", "parameter", "unit"])
def test_a_clipper_does_without_float64(rule, scope, narrow):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = GradientClipper(optimizer, rule(), scope=scope, max_value=1.0, nonfinite="skip")
    for factor in (1.0, 10.0, math.nan, 1.0, 5.0):
        optimizer.zero_grad()
        (model(torch.randn(5, 4)) * factor).sum().backward()
        optimizer.step()
    assert clipper.last.norm.dtype is torch.float32
