"""Choice of the engine that serves a device; nothing else."""

from __future__ import annotations

import torch

from ..errors import ArgumentError, EngineUnavailableError
from . import native
from .base import Engine, norm_dtype
from .operators import OperatorsEngine
from .reference import ReferenceEngine

__all__ = ["Engine", "check_engine_name", "engine_for", "norm_dtype"]

_ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (OperatorsEngine(), ReferenceEngine())
}
_MISSING: dict[str, str] = {
    "triton": "engine='triton' is not available in this version of gradclip: give engine='auto'."
}
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
    if name == "auto" or name in _ENGINES:
        return str(name)
    if name in _MISSING:
        raise EngineUnavailableError(_MISSING[str(name)])
    raise ArgumentError(
        f"engine={name!r} names no engine: give 'auto' or one of "
        f"{', '.join(map(repr, (*_ENGINES, *_MISSING)))}."
    )


def engine_for(name: str, device: torch.device) -> Engine:
    """Return the engine that serves a device; only ``"auto"`` chooses.

    Raises:
        EngineUnavailableError: The engine does not serve such a device.
    """
    if name == "auto":
        return _BEST.get(device.type, _ENGINES["operators"])
    if name == "native" and device.type != "cpu":
        raise EngineUnavailableError(
            f"engine='native' serves the CPU, and there are gradients on {device}: give "
            "engine='auto', which chooses for each device."
        )
    return _ENGINES[name]
