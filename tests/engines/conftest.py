from __future__ import annotations

import pytest
import torch

from gradclip.engines import _ENGINES, host_sums, memory
from gradclip.engines.host_sums import ROW


@pytest.fixture(params=list(_ENGINES.values()), ids=list(_ENGINES))
def engine(request, monkeypatch):
    """Each engine; limits inside the operators engine are lowered, so that small tensors pass."""
    monkeypatch.setattr(host_sums, "SMALL", 600)
    monkeypatch.setattr(memory, "CHUNK", 8 * ROW)
    with torch.no_grad():
        yield request.param


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param
