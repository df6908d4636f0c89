"""Choice of the engine that serves a device; nothing else."""

from __future__ import annotations

import torch

from ..errors import ArgumentError, EngineUnavailableError
from .base import Engine, norm_dtype
from .operators import OperatorsEngine
from .reference import ReferenceEngine

__all__ = ["Engine", "check_engine_name", "engine_for", "norm_dtype"]

_ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (OperatorsEngine(), ReferenceEngine())
}
_PLANNED = ("native", "triton")


def check_engine_name(name: object) -> str:
    """Return ``name`` if it chooses an engine that is there.

    Raises:
        ArgumentError: It names no engine.
        EngineUnavailableError: It names an engine that this installation lacks.
    """
    if name == "auto" or name in _ENGINES:
        return str(name)
    if name in _PLANNED:
        raise EngineUnavailableError(
            f"engine={name!r} is not available in this version of gradclip: "
            f"give engine='auto' or one of {', '.join(map(repr, _ENGINES))}."
        )
    raise ArgumentError(
        f"engine={name!r} names no engine: give 'auto' or one of "
        f"{', '.join(map(repr, (*_ENGINES, *_PLANNED)))}."
    )


def engine_for(name: str, device: torch.device) -> Engine:
    """Return the engine that serves a device; only ``"auto"`` chooses."""
    if name == "auto":
        return _ENGINES["operators"]
    return _ENGINES[name]
