"""Floating-point numbers by their bits, which hide nothing where arithmetic flushes denormals."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_bits(values: Tensor) -> Tensor:
    """Return the bits but for the sign, integers that order as the magnitudes do, NaN last."""
    integers = INTEGERS[values.element_size()]
    return values.view(integers) & torch.iinfo(integers).max


def are_filled(table: Tensor) -> Tensor:
    """Tell which rows are not all zero, without a copy; a zero with a sign counts as filled."""
    return table.view(torch.uint8).amax(1) > 0


def flushes_denormals() -> bool:
    """Tell whether arithmetic on the CPU takes numbers below the normal ones for 0."""
    smallest = torch.tensor([1], dtype=torch.int32, device="cpu").view(torch.float32)
    return float(smallest.double()) == 0


def widened(values: Tensor) -> Tensor:
    """Return the magnitudes in float64, read from the bits where arithmetic would see 0."""
    info = torch.finfo(values.dtype)
    bits = magnitude_bits(values)
    # Where the exponent bits are zero a float is its mantissa times the smallest subnormal.
    denormal = bits.double() * (info.smallest_normal * info.eps)
    return torch.where(bits < 1 / info.eps, denormal, values.double().abs())
