"""Kernels as they are launched, compiled for a GPU that is not there, and not run."""

import contextlib
import math
import types

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from gradclip.engines.base import RelativeLimit, TensorList
from gradclip.engines.triton import kernels, launching, requests
from gradclip.engines.triton.engine import TritonEngine

SLOW = [
    pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
]
KERNELS = ("power_sums", "strip_sums", "change", "clip_rows", "write_addresses")


NO_DEVICE = types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device=0: 0,
)
"""A driver with a device that only compiles."""


class Compiled:
    """A kernel that is compiled for its arguments where it would be launched."""

    def __init__(self, kernel, launches) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            compiled = self._kernel.warmup(*arguments, grid=grid, **options)
            self._launches.append((self._kernel.fn.__name__, grid, compiled.hash))

        return launch


@pytest.fixture
def launches(monkeypatch):
    if launching.INTERPRETED:
        pytest.skip("the kernels are interpreted")
    found = []
    stream = types.SimpleNamespace(cuda_stream=0)
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), found))
    monkeypatch.setattr(launching, "DEVICE", "cpu")
    monkeypatch.setattr(launching, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(requests, "processors", lambda device: 132)
    monkeypatch.setattr(launching, "_on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    # Triton 3.2 has the one name, later versions the other.
    monkeypatch.setattr(driver, "active" if "active" in vars(driver) else "_active", NO_DEVICE)
    launching._failure.cache_clear()
    return found


def names(launches) -> list[str]:
    return [name for name, _, _ in launches]


@pytest.mark.parametrize("dtype", [torch.float32, *SLOW], ids=str)
@pytest.mark.parametrize("order", [2.0, math.inf, pytest.param(3.0, marks=pytest.mark.slow)])
def test_every_launch_compiles_as_it_is_launched(dtype, order, launches):
    served = TritonEngine()
    tensors = [torch.zeros(size, dtype=dtype) for size in ((100, 100), (7,), (300_000,), (0,))]
    assert served.norm(tensors, order).shape == (1,)
    assert served.norm(tensors, order, scalar=True).shape == ()
    assert names(launches) == ["write_addresses"] + ["power_sums"] * 2  # the first for later
    assert served.power_sums(tensors, order).shape == (4,)
    assert served.power_sums(tensors[:1], order, rows=True).shape == (100,)
    assert names(launches)[3:] == ["power_sums", "strip_sums", "power_sums"]
    launches.clear()
    norm, sums = served.norm_and_sums(tensors, order)
    assert (norm.shape, sums.shape) == ((1,), (4,))
    assert names(launches) == ["power_sums", "strip_sums"]
    launches.clear()
    for numbers in (1, 4):
        served.scale_(tensors, torch.full((numbers,), 0.5, dtype=torch.float64))
        served.clamp_(tensors, torch.full((numbers,), 0.5, dtype=torch.float64))
    assert names(launches) == ["change"] * 4


def test_rows_are_clipped_by_one_launch(launches):
    served, shapes = TritonEngine(), ((100, 100), (7,), (3, 60_000))
    pair = [TensorList(torch.zeros(shape) for shape in shapes) for _ in range(2)]
    assert served.prepare_rows(*pair, 2.0, rows=True) == 104
    launches.clear()
    limit = RelativeLimit(0.01, 1e-3)
    found = served.clip_rows_(*pair, 2.0, limit, erase=True, write=True)
    assert found.shape == (3, 104)
    assert names(launches) == ["clip_rows"]
    served.scale_rows_(pair[0], found[2])
    assert names(launches) == ["clip_rows", "change"]


def test_other_sizes_and_addresses_are_nothing_to_compile_anew(launches):
    served = TritonEngine()
    half = torch.full((1,), 0.5, dtype=torch.float64)
    for size in (1, 16, 17, 4096, 1_000_000):
        tensors = [torch.zeros(size + 1)[1:], torch.zeros(size)]
        served.norm(tensors, 2.0)
        served.scale_(tensors, half)
    table = launching.written_by_kernels(torch.device("cpu"), [0, *range(1 << 46, (1 << 46) + 19)])
    assert table.numel() >= 20
    assert len({(name, compiled) for name, _, compiled in launches}) == 3
    assert names(launches).count("write_addresses") == 1 + 3
