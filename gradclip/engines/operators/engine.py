"""The engine of torch operators, for the CPU and for every device without an engine of its own.

It has two implementations: on the CPU the host may read values for free, so it writes only what
changes; on another device a read would be a host sync, so it always writes.

It uses only operators that ignore the matmul precision and the default device, and runs them
without autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..base import Engine
from . import device, host


class OperatorsEngine(Engine):
    """Measures with one read and, on the CPU, writes only what changes; needs no compiler."""

    name = "operators"

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        if not tensors[0].is_cpu:
            return device.power_sums(tensors, order, rows=rows)
        with _without_autocast():
            return host.power_sums(tensors, order, rows=rows)

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        if tensors[0].is_cpu:
            with _without_autocast():
                norm = host.norm(tensors, order)
        else:
            norm = device.norm(tensors, order)
        return norm.squeeze(0) if scalar else norm

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """See `Engine.norm_and_sums`. On the CPU it reads the gradients twice."""
        if tensors[0].is_cpu:
            return super().norm_and_sums(tensors, order)
        return device.norm_and_sums(tensors, order)

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`. Off the CPU it always multiplies, also by 1."""
        implementation = host if tensors[0].is_cpu else device
        implementation.scale_(tensors, coefficients, rows=rows)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`. Off the CPU it always writes."""
        if not tensors[0].is_cpu:
            device.clamp_(tensors, bounds, rows=rows)
            return
        with _without_autocast():
            host.clamp_(tensors, bounds, rows=rows)


OPERATORS = OperatorsEngine()
"""One object serves all: it has no state. The native and Triton engines fall back to it."""


def _without_autocast() -> AbstractContextManager[object]:
    # Autocast chooses the dtype of torch.cat, or refuses float16 there.
    return (
        torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()
    )
