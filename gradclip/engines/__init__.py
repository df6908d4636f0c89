"""Engines: the arithmetic of clipping on plain tensors, and the engine for each device.

An engine knows nothing of scopes, thresholds or ranks. ``base.py`` is the interface and
``reference.py`` its plain float64 form; ``operators/`` uses torch's own operators, ``native/`` is
written in C, ``triton/`` holds kernels for CUDA. ``layout.py``, ``no_grad.py`` and
``cuda_graphs.py`` deal with memory, autograd and captured graphs.

Called by: thresholds, scopes, ranks, records, gradients, optimizers, functional, clipper.
Imports: errors.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from ..errors import ArgumentError, EngineUnavailableError
from .base import Engine, norm_dtype
from .native import loading
from .native.engine import NativeEngine
from .operators.engine import OPERATORS
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
"""The version that torch 2.6 brings; the kernels were not tried with older ones."""

_ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OPERATORS, ReferenceEngine())}
"""The engines that this installation has, one object each; Triton's is added on demand."""
_BEST: dict[str, Engine] = {}
"""The fastest engine of a device type; torch operators serve the types that have no entry."""


def check_engine_name(name: object) -> str:
    """Return ``name`` if it chooses an engine that this installation has.

    Raises:
        ArgumentError: There is no engine of this name.
        EngineUnavailableError: This installation lacks the engine.
    """
    if name == "auto":
        return "auto"
    reason = _load_native() if name == "native" else _load_triton() if name == "triton" else None
    if reason is not None:
        raise EngineUnavailableError(reason)
    if isinstance(name, str) and name in _ENGINES:
        return name
    raise ArgumentError(
        f"engine={name!r} names no engine: give 'auto' or one of "
        "'operators', 'reference', 'native', 'triton'."
    )


def engine_for(name: str, device: torch.device) -> Engine:
    """Return the engine that serves a device; only ``"auto"`` chooses.

    Raises:
        ArgumentError: There is no engine of this name.
        EngineUnavailableError: This installation lacks the engine, or it does not support the
            device.
    """
    if name != "auto":
        engine = _ENGINES[check_engine_name(name)]
        engine.check_supported(device)
        return engine
    if device.type == "cuda":
        _load_triton()
    best = _BEST.get(device.type)
    return OPERATORS if best is None or best.unsupported(device) else best


# Cached, so that an installation without Triton does not look for it at every step.
@cache
def _load_triton() -> str | None:
    """Add the engine of Triton kernels; return why this installation lacks it, or None.

    Not done at import: Triton takes a second to load, and few programs need it.
    """
    remedy = (
        "Install a newer torch with its CUDA packages, which bring Triton; or give engine='auto', "
        "which takes torch operators."
    )
    try:
        import triton
    except ImportError as error:
        return f"engine='triton' is not available: {error}. {remedy}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return (
            f"engine='triton' is not available: Triton {triton.__version__} is installed, "
            f"{'.'.join(map(str, OLDEST_TRITON))} or newer is needed. {remedy}"
        )
    from .triton.engine import TritonEngine
    from .triton.launching import INTERPRETED

    _ENGINES["triton"] = TritonEngine()
    # Interpreted kernels are for tests: they serve the CPU, slowly.
    if not INTERPRETED:
        _BEST["cuda"] = _ENGINES["triton"]
    return None


@cache
def _load_native() -> str | None:
    """Add the native engine; return why this installation lacks it, or None.

    A library that is there and does not fit is a fault and gets a warning; an installation without
    a library is none.
    """
    try:
        _ENGINES["native"] = _BEST["cpu"] = NativeEngine(loading.load())
    except EngineUnavailableError as error:
        if loading.LIBRARY.exists():
            message = f"Torch operators serve the CPU, since {error}"
            warnings.warn(message, UserWarning, stacklevel=2)
        return str(error)
    return None


_load_native()
