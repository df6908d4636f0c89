"""Every engine as a fixture, and the helpers of its tests: tensors, and their bits."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from gradclip import engines
from gradclip.engines import _ENGINES as REGISTRY
from gradclip.engines import _load_triton as load_triton
from gradclip.engines import layout
from gradclip.engines.base import INTEGERS
from gradclip.engines.native.loading import BEST
from gradclip.engines.operators import host
from tests.support.device import DeviceEngine
from tests.support.own_classes import own_classes

ORDERS = [1.0, 2.0, math.inf, 0.5, 3.0]
LEVELS = {"native": BEST, "native with AVX2": 1, "native for any processor": 0}
"""Instruction sets of the native engine; where the processor lacks one, the next lower serves."""
OLDER = [*LEVELS][1:]
"""Slow: test_native.py shows quickly that their bits are those of the best level."""
ON_CUDA, OFF_CPU = " on cuda", " off the cpu"
"""Of torch operators off the CPU there is also the code alone, on tensors of the CPU."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process tests the Triton kernels, on the CPU, and nothing else."""
OWN = {engine.name: engine() for engine in own_classes("GRADCLIP_ENGINE").values()}
"""An engine of the reader's own, which is then the only one."""
SMALL, CHUNK = 600, 8 * host.PIECE
"""Sizes inside the operators engine, lowered by `engine` so that small tensors pass them."""


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that compares equal only to the same bits."""
    return tensor.detach().resolve_neg().contiguous().view(INTEGERS[tensor.element_size()]).clone()


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return random(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """The whole buffer that a tensor is a view of."""
    return tensor.new_empty(0).set_(tensor.untyped_storage())


def power_sum(tensor: torch.Tensor, order: float) -> float:
    values = tensor.double().abs().flatten()
    if not values.numel():
        return 0.0
    return (values.max() if order == math.inf else (values**order).sum()).item()


def assert_scaled(found: torch.Tensor, original: torch.Tensor, coefficient: torch.Tensor) -> None:
    """Check products up to one rounding, and one of the coefficient to float32."""
    erased, info = coefficient == 0, torch.finfo(original.dtype)
    expected = (original.double() * coefficient).masked_fill(erased, 0)
    tolerance = (info.eps / 2 + 2.0**-24) * expected.abs() + info.smallest_normal * info.eps
    error = (found.double() - expected).abs()
    assert bool((error <= tolerance.masked_fill(erased, 0)).all())


@contextmanager
def denormals_flushed(flush: bool = True) -> Iterator[None]:
    """Let the CPU take denormals for 0 within a block, or not."""
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("denormals cannot be flushed on this processor")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _engines():
    if OWN:
        return [*OWN]
    if INTERPRETED:
        return [pytest.param("triton", marks=pytest.mark.interpreted)]
    return [
        "operators",
        "operators" + OFF_CPU,
        "reference",
        *(pytest.param(name, marks=pytest.mark.slow if name in OLDER else ()) for name in LEVELS),
        *(pytest.param(name + ON_CUDA, marks=pytest.mark.cuda) for name in ("triton", "operators")),
    ]


@pytest.fixture(params=_engines())
def engine(request, monkeypatch):
    """Each engine, with gradient tracking off."""
    monkeypatch.setattr(host, "SMALL", SMALL)
    monkeypatch.setattr(layout, "CHUNK", CHUNK)
    name = request.param.split()[0]
    with torch.no_grad():
        if name == "native":
            library = request.getfixturevalue("native_engine")._library
            library.gradclip_choose(LEVELS[request.param])
            yield REGISTRY[name]
            library.gradclip_choose(BEST)
        elif name == "triton":
            yield request.getfixturevalue("triton_engine")
        elif request.param.endswith(OFF_CPU):
            yield DeviceEngine()
        else:
            if request.param.endswith(ON_CUDA):
                request.getfixturevalue("on_cuda")
            yield {**REGISTRY, **OWN}[name]


@pytest.fixture(params=["native", "operators"], scope="module")
def cpu_engine(request) -> Iterator[engines.Engine]:
    """Each engine that ``"auto"`` may choose on the CPU, chosen now."""
    if request.param not in REGISTRY:
        pytest.skip("the native engine was not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engines._BEST, "cpu", REGISTRY[request.param])
        yield REGISTRY[request.param]


@pytest.fixture
def without_graph():
    """Gradient tracking is off, as it is whenever an engine is called."""
    with torch.no_grad():
        yield


@pytest.fixture
def native_engine():
    """The native engine, where a compiler has built it."""
    if "native" not in REGISTRY:
        pytest.skip("the native engine was not built")
    return REGISTRY["native"]


@pytest.fixture
def triton_engine(request):
    """The engine of Triton kernels: on CUDA, or interpreted, in blocks that suit small tensors."""
    if not INTERPRETED:
        request.getfixturevalue("on_cuda")
    load_triton()
    from gradclip.engines.triton.engine import TritonEngine

    # NumPy warns of masked lanes, such as the logarithm of 0, where a device is silent.
    with np.errstate(all="ignore"):
        yield TritonEngine(block=512 if INTERPRETED else 1024)


@pytest.fixture(scope="session", autouse=INTERPRETED)
def quick_interpreter():
    """Patch Triton's language once for a kernel, not for each function it calls: half the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(function, *args, **kwargs):
        names = function.fn.__globals__.values()
        if all(module is not tl for module in names) and function.fn not in patched:
            interpreter._patch_lang(function.fn)
            patched.add(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture
def on_cuda():
    """Tensors are made on a CUDA device."""
    with torch.device("cuda"):
        yield


@pytest.fixture
def rewritten(engine, monkeypatch):
    """Return whether a tensor was written since it had a version, and since the last `forget`.

    On a device the version says nothing, since the device alone knows; of the interpreter each
    store is seen.
    """
    return _Rewritten(monkeypatch, known=not isinstance(engine, DeviceEngine))


class _Rewritten:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, known: bool) -> None:
        self._known, self._addresses = known, []
        if not INTERPRETED:
            return
        from triton.runtime.interpreter import InterpreterBuilder

        store = InterpreterBuilder.create_masked_store

        def noting(builder, to, value, mask, *others):
            self._addresses.append(np.atleast_1d(to.data)[np.atleast_1d(mask.data)])
            return store(builder, to, value, mask, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noting)

    def forget(self) -> None:
        self._addresses.clear()

    def __call__(self, tensor: torch.Tensor, version: int) -> bool:
        if not INTERPRETED:
            return tensor.is_cpu and self._known and tensor._version != version
        memory = tensor.untyped_storage()
        begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        return any(((begin <= at) & (at < end)).any() for at in self._addresses)


# The interpreter is slow.
_RARE = pytest.mark.slow if INTERPRETED else ()
_DTYPES = [torch.float32, torch.bfloat16]
_DTYPES += [pytest.param(rare, marks=_RARE) for rare in (torch.float64, torch.float16)]


@pytest.fixture(params=_DTYPES, ids=str)
def dtype(request):
    return request.param
