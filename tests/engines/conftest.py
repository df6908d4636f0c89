from __future__ import annotations

import pytest
import torch

from gradclip.engines import _ENGINES, host_sums, memory, native
from gradclip.engines.host_sums import ROW

LEVELS = {"native": native.BEST, "native with AVX2": 1, "native for any processor": 0}
"""Instruction sets of the native engine; for what the processor lacks the next lower serves."""
OLDER = [*LEVELS][1:]
"""Their bits are those of the best level, as test_native.py shows quickly."""


@pytest.fixture(
    params=[
        "operators",
        "reference",
        *(pytest.param(name, marks=pytest.mark.slow if name in OLDER else ()) for name in LEVELS),
    ]
)
def engine(request, monkeypatch):
    """Each engine; limits inside the operators engine are lowered, so that small tensors pass."""
    monkeypatch.setattr(host_sums, "SMALL", 600)
    monkeypatch.setattr(memory, "CHUNK", 8 * ROW)
    name = request.param.split()[0]
    if name == "native":
        library = request.getfixturevalue("native_engine")._library
        library.gradclip_choose(LEVELS[request.param])
    with torch.no_grad():
        yield _ENGINES[name]
    if name == "native":
        library.gradclip_choose(native.BEST)


@pytest.fixture
def native_engine():
    """The native engine, where there was a compiler to build it."""
    if "native" not in _ENGINES:
        pytest.skip("the native engine was not built")
    return _ENGINES["native"]


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param
