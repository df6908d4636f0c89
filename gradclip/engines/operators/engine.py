"""The engine of torch operators: the CPU, and any device without an engine of its own.

Two ways, because the host may look at a CPU tensor for free and must never look at another.

Only operators that obey neither the matmul precision nor a default device, and none under
autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..base import Engine
from . import device, host_sums, host_writing


class OperatorsEngine(Engine):
    """Measures with one read and writes only what changes, in torch operators alone."""

    name = "operators"

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        if not tensors[0].is_cpu:
            return device.power_sums(tensors, order, rows=rows)
        with _without_autocast():
            return host_sums.power_sums(tensors, order, rows=rows)

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        if tensors[0].is_cpu:
            with _without_autocast():
                norm = host_sums.norm(tensors, order)
        else:
            norm = device.norm(tensors, order)
        return norm.squeeze(0) if scalar else norm

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """See `Engine.norm_and_sums`. On the CPU it reads twice."""
        if tensors[0].is_cpu:
            return super().norm_and_sums(tensors, order)
        return device.norm_and_sums(tensors, order)

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`. Off the CPU it multiplies always, since looking would wait."""
        way = host_writing if tensors[0].is_cpu else device
        way.scale_(tensors, coefficients, rows=rows)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`. Off the CPU it writes always, since looking would wait."""
        if not tensors[0].is_cpu:
            device.clamp_(tensors, bounds, rows=rows)
            return
        with _without_autocast():
            host_writing.clamp_(tensors, bounds, rows=rows)


def _without_autocast() -> AbstractContextManager[object]:
    # It would choose the dtype in which tensors are concatenated, or refuse to.
    return (
        torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    )


OPERATORS = OperatorsEngine()
"""One object serves all: it has no state. The native and Triton engines fall back to it."""
