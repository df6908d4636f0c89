"""The operators engine off the CPU, where reading a value would raise."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradclip
from gradclip.engines import engine_for

ENGINE = engine_for("operators", torch.device("cpu"))


@pytest.mark.usefixtures("without_graph")
@pytest.mark.parametrize("kind", ["cuda", "meta"])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf, 3.0])
def test_off_the_cpu_no_value_is_read(kind, order):
    """A fake tensor has no values: reading one would raise."""
    with FakeTensorMode():
        tensors = [torch.empty(size, device=kind) for size in [(50, 3), (), (0,), (9000,)]]
        tensors.append(torch.empty(1, device=kind).expand(7))
        norm = gradclip.clip_gradients_(tensors, 1.0, order)
        assert (norm.device.type, norm.dtype, norm.shape) == (kind, torch.float64, ())
        ENGINE.clamp_(tensors, torch.ones(1, device=kind))
        ENGINE.scale_(tensors, torch.ones(len(tensors), device=kind))
        tensors = [torch.empty(size, device=kind) for size in [(50, 3), (7,), (0, 2), (9, 2, 2)]]
        tensors.append(torch.empty(3, 1, device=kind).expand(3, 7))
        numbers = torch.ones(69, device=kind, dtype=torch.float64)
        sums = ENGINE.power_sums(tensors, order, rows=True)
        assert (sums.device.type, sums.dtype, sums.shape) == (kind, torch.float64, (69,))
        ENGINE.clamp_(tensors, numbers, rows=True)
        ENGINE.scale_(tensors, numbers, rows=True)
    windows = torch.empty(100, device="meta").as_strided((9, 20), (10, 1))
    ENGINE.scale_([windows], torch.ones(1, device="meta"))
    windows = torch.empty(100, device="meta").as_strided((4, 3, 5), (12, 2, 1))
    ENGINE.scale_([windows], torch.ones(4, device="meta"), rows=True)
