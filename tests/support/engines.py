from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gradclip.engines import _ENGINES, _load_triton
from gradclip.engines import layout as memory
from gradclip.engines.native import engine as native
from gradclip.engines.operators import host_sums
from gradclip.engines.operators.host_sums import ROW

LEVELS = {"native": native.BEST, "native with AVX2": 1, "native for any processor": 0}
"""Instruction sets of the native engine; for what the processor lacks the next lower serves."""
OLDER = [*LEVELS][1:]
"""Their bits are those of the best level, as test_native.py shows quickly."""
ON_CUDA = " on cuda"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process tests the Triton kernels, on the CPU, and nothing else."""


def _engines():
    if INTERPRETED:
        return [pytest.param("triton", marks=pytest.mark.interpreted)]
    return [
        "operators",
        "reference",
        *(pytest.param(name, marks=pytest.mark.slow if name in OLDER else ()) for name in LEVELS),
        *(pytest.param(name + ON_CUDA, marks=pytest.mark.cuda) for name in ("triton", "operators")),
    ]


@pytest.fixture(params=_engines())
def engine(request, monkeypatch):
    """Each engine; limits inside are lowered, so that small tensors pass them."""
    monkeypatch.setattr(host_sums, "SMALL", 600)
    monkeypatch.setattr(memory, "CHUNK", 8 * ROW)
    name = request.param.split()[0]
    with torch.no_grad():
        if name == "native":
            library = request.getfixturevalue("native_engine")._library
            library.gradclip_choose(LEVELS[request.param])
            yield _ENGINES[name]
            library.gradclip_choose(native.BEST)
        elif name == "triton":
            yield request.getfixturevalue("triton_engine")
        elif request.param.endswith(ON_CUDA):
            request.getfixturevalue("on_cuda")
            yield _ENGINES[name]
        else:
            yield _ENGINES[name]


@pytest.fixture
def native_engine():
    """The native engine, where there was a compiler to build it."""
    if "native" not in _ENGINES:
        pytest.skip("the native engine was not built")
    return _ENGINES["native"]


@pytest.fixture
def triton_engine(request):
    """The engine of Triton kernels: on CUDA, or interpreted, in blocks that suit small tensors."""
    if not INTERPRETED:
        request.getfixturevalue("on_cuda")
    _load_triton()
    from gradclip.engines.triton.engine import TritonEngine

    # Of what is not there, as the logarithm of 0, NumPy warns where a device is silent.
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
def rewritten(monkeypatch):
    """Tell whether a tensor was written since it had a version, and since the last `forget`.

    Where a device alone knows, the version says nothing; of the interpreter each store is seen.
    """
    return _Stores(monkeypatch) if INTERPRETED else _Versions()


class _Versions:
    def forget(self) -> None:
        pass

    def __call__(self, tensor: torch.Tensor, version: int) -> bool:
        return tensor.is_cpu and tensor._version != version


class _Stores:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self._addresses: list[np.ndarray] = []
        store = InterpreterBuilder.create_masked_store

        def seen(builder, to, value, mask, *others):
            self._addresses.append(np.atleast_1d(to.data)[np.atleast_1d(mask.data)])
            return store(builder, to, value, mask, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", seen)

    def forget(self) -> None:
        self._addresses.clear()

    def __call__(self, tensor: torch.Tensor, version: int) -> bool:
        storage = tensor.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        return any(((begin <= at) & (at < end)).any() for at in self._addresses)


def _dtypes():
    # The interpreter is slow.
    rare = pytest.mark.slow if INTERPRETED else ()
    for dtype in (torch.float32, torch.bfloat16):
        yield dtype
    for dtype in (torch.float64, torch.float16):
        yield pytest.param(dtype, marks=rare)


@pytest.fixture(params=_dtypes(), ids=str)
def dtype(request):
    return request.param
