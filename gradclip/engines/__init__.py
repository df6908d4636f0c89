"""Engines: the arithmetic of clipping over plain tensors, and the choice of the one for a device.

An engine knows nothing of scopes, thresholds or ranks. ``base.py`` is the protocol,
``reference.py`` its plainest form; ``operators/`` are torch's own operators, ``native/`` is C,
``triton/`` is CUDA. ``layout.py``, ``no_grad.py`` and ``cuda_graphs.py`` deal with memory,
autograd and captured graphs.

Called by: thresholds, scopes, ranks, records, gradients, optimizers, functional, clipper.
Imports: errors.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..errors import ArgumentError, EngineUnavailableError
from .base import Engine, norm_dtype
from .native import engine as native
from .operators.engine import OperatorsEngine
from .reference import ReferenceEngine

__all__ = [
    "Engine",
    "base",
    "check_engine_name",
    "cuda_graphs",
    "engine_for",
    "layout",
    "no_grad",
    "norm_dtype",
]

OLDEST_TRITON = (3, 2)
"""That of torch 2.6; with older ones the kernels were not tried."""

_ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (OperatorsEngine(), ReferenceEngine())
}
_MISSING: dict[str, str] = {}
"""Why an engine is not there."""
_BEST: dict[str, Engine] = {}
"""By the type of a device, what serves it best; torch operators serve the others."""

try:
    _ENGINES["native"] = _BEST["cpu"] = native.NativeEngine(native.load())
except EngineUnavailableError as error:
    _MISSING["native"] = str(error)


def check_engine_name(name: object) -> str:
    """Return ``name`` if it chooses an engine that is there.

    Raises:
        ArgumentError: It names no engine.
        EngineUnavailableError: It names an engine that this installation lacks.
    """
    if name == "triton":
        _load_triton()
    if name == "auto" or name in _ENGINES:
        return str(name)
    if name in _MISSING:
        raise EngineUnavailableError(_MISSING[str(name)])
    raise ArgumentError(
        f"engine={name!r} names no engine: give 'auto' or one of "
        "'operators', 'reference', 'native', 'triton'."
    )


def engine_for(name: str, device: torch.device) -> Engine:
    """Return the engine that serves a device; only ``"auto"`` chooses.

    Raises:
        ArgumentError: There is no such engine.
        EngineUnavailableError: The engine is not there, or does not serve such a device.
    """
    if name != "auto":
        engine = _ENGINES[check_engine_name(name)]
        engine.check_serves(device)
        return engine
    if device.type == "cuda":
        _load_triton()
    best = _BEST.get(device.type)
    return _ENGINES["operators"] if best is None or best.unserved(device) else best


@lru_cache(maxsize=1)
def _load_triton() -> None:
    """Put the engine of Triton kernels, whose import takes a while, among the others."""
    remedy = (
        "Install a newer torch with its CUDA packages, which bring Triton; or give engine='auto', "
        "which takes torch operators."
    )
    try:
        import triton
    except ImportError as error:
        _MISSING["triton"] = f"engine='triton' is not available: {error}. {remedy}"
        return
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        _MISSING["triton"] = (
            f"engine='triton' is not available: Triton {triton.__version__} is installed, needed "
            f"is {'.'.join(map(str, OLDEST_TRITON))} or newer. {remedy}"
        )
        return
    from .triton.engine import TritonEngine
    from .triton.launching import INTERPRETED

    _ENGINES["triton"] = TritonEngine()
    if not INTERPRETED:
        _BEST["cuda"] = _ENGINES["triton"]
