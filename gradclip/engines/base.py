"""The interface of an engine: norms, power sums, scaling and element-wise bounds of tensors.

An engine works on lists of tensors of one device and one dtype. It knows nothing of scopes,
thresholds or ranks, and keeps no state that changes a result.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import EngineUnavailableError
from .shared_memory import scale_once_

CPU = torch.device("cpu")
INFINITY = math.inf
REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of tensors that engines take."""
_FACTS = attrgetter("dtype", "device", "layout")
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype of an element size. Magnitudes are ordered as their bits without the sign."""


class TensorList(list[Tensor]):
    """Tensors that a step measures first and writes afterwards, without a change in between.

    An engine may store here what it has prepared for them, and use it for the second call.
    """

    note: object = None


class RelativeLimit(NamedTuple):
    """The largest norm of a row: ``factor max(norm of its weights, eps)``, from floor to cap."""

    factor: float
    eps: float
    floor: float = 0.0
    cap: float = INFINITY


class Engine(ABC):
    """Measuring and writing of gradients of one device and one dtype.

    All methods are called with gradient tracking off. Tensors are real floating-point ones of any
    strides and any shape, 0-d and empty ones included. Elements that share memory count one by one
    in a norm, and each memory location is written once: `scale_places_` sees to it where several
    tensors share one.
    """

    name: str
    """The value of the option ``engine=``, and the name in ``clipper.engine``."""

    def unsupported(self, device: torch.device) -> str | None:
        """Return the error text for a device that the engine does not support, else None."""
        return None

    def check_supported(self, device: torch.device) -> None:
        """Check that the engine supports a device.

        Raises:
            EngineUnavailableError: It does not.
        """
        reason = self.unsupported(device)
        if reason is not None:
            raise EngineUnavailableError(reason)

    @abstractmethod
    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """Return the sum of ``|x| ** order`` of each tensor, or the largest ``|x|`` for infinity.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.
            rows: Return one sum for each index of dimension 0, which every tensor then has, and
                not one for each tensor.

        Returns:
            Shape (n,) or (number of all rows,), float64 (float32 if the device has no float64), on
            the tensors' device. NaN and infinite elements make their sum NaN or infinite; the sum
            of no elements is 0.
        """

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """Return the norm of all tensors together: the usual case, for which engines are faster.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.
            scalar: Return a 0-d tensor.

        Returns:
            Shape (1,) or (), dtype and device as for `power_sums`.
        """
        sums = self.power_sums(tensors, order)
        if order == INFINITY:
            return sums.amax(0, keepdim=not scalar)
        return root(sums.sum(0, keepdim=not scalar), order)

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """Return the norm of all tensors together, with the bits of `norm`, and each power sum.

        This default reads the gradients twice; an engine that computes both at once overrides it.

        Args:
            tensors: n >= 1 gradients of one device and dtype. Not written.
            order: p of the p-norm, positive or infinity.

        Returns:
            Shapes (1,) and (n,), as for `norm` and `power_sums`.
        """
        return self.norm(tensors, order), self.power_sums(tensors, order)

    # The usual step: one norm on the CPU, which the host reads as a number at once.

    def prepare(self, tensors: TensorList, order: float) -> bool:
        """Look at the gradients of a step, once for `host_norm` and `host_scale_`.

        Args:
            tensors: What the parameters of a step hold. Not written.
            order: p of the p-norm that will be measured.

        Returns:
            True if they are n >= 1 plain tensors of one dtype on the CPU, each with elements of
            its own; False for anything else, which the other methods serve.
        """
        if {*map(type, tensors)} != {Tensor} or len({*map(id, tensors)}) < len(tensors):
            return False
        return are_alike(tensors) and all(map(host_may_read, tensors))

    def host_norm(self, tensors: TensorList, order: float, sums: Tensor | None = None) -> float:
        """Return the norm of all tensors together as a number.

        Args:
            tensors: n >= 1 gradients for which `prepare` returned True. Not written.
            order: p of the p-norm, as for `prepare`.
            sums: Filled with the power sum of each tensor; shape (n,), float64, on the CPU.
        """
        if sums is None:
            return self.norm(tensors, order).item()
        norm, measured = self.norm_and_sums(tensors, order)
        sums.copy_(measured)
        return norm.item()

    def host_power_sums(self, tensors: TensorList, order: float) -> Tensor:
        """Return the power sum of each tensor, for a norm that spans other ranks as well.

        Args:
            tensors: As for `host_norm`.
            order: p of the p-norm, as for `prepare`.

        Returns:
            Shape (n,), float64, on the CPU.
        """
        return self.power_sums(tensors, order)

    def host_scale_(self, tensors: TensorList, coefficient: float) -> None:
        """Multiply tensors by one coefficient, in place; see `scale_`.

        Args:
            tensors: As for `host_norm`.
            coefficient: In [0, 1].
        """
        dtype = norm_dtype(tensors[0].device)
        number = torch.full((1,), coefficient, dtype=dtype, device="cpu")
        self.scale_places_(tensors, number)

    def host_clip_(self, tensors: TensorList, threshold: float, order: float) -> Tensor:
        """Scale tensors to a threshold in place, if their norm is finite and above it.

        Args:
            tensors: As for `host_norm`.
            threshold: The largest norm allowed, infinity for no limit.
            order: As for `host_norm`.

        Returns:
            The norm before; 0-d, float64.
        """
        norm = self.norm(tensors, order, scalar=True)
        if threshold < norm.item() < INFINITY:
            self.host_scale_(tensors, threshold / norm.item())
        return norm

    # Rows and the rows of their weights, read in one pass. A tensor of less than two dimensions is
    # one row, and so is every tensor if the caller says so.

    def prepare_rows(
        self, gradients: TensorList, weights: TensorList, order: float, *, rows: bool
    ) -> int:
        """Look at gradients and their weights, once for `clip_rows_` and `scale_rows_`.

        Args:
            gradients: What the parameters of a step hold. Not written.
            weights: The parameters, of the same shapes in the same order.
            order: p of the p-norm, positive or infinity.
            rows: True for a norm of each index of dimension 0, False for one of each tensor.

        Returns:
            The number of rows; 0 if the engine makes no such pass over these tensors, which the
            other methods serve. It does over plain ones of one dtype and one device, each with
            elements of its own.
        """
        return 0

    def clip_rows_(
        self,
        gradients: TensorList,
        weights: TensorList,
        order: float,
        limit: RelativeLimit,
        *,
        erase: bool,
        write: bool,
    ) -> Tensor:
        """Scale each row in place whose norm is above the limit that its weights set.

        The formulas are those of `RelativeToWeights` and of `clip_coefficients`. No host sync.

        Args:
            gradients: Gradients that `prepare_rows` has accepted.
            weights: Their weights. Not written.
            order: As for `prepare_rows`.
            limit: The largest norms.
            erase: True if a row whose norm is NaN or infinite becomes 0, False if it stays.
            write: False to measure alone.

        Returns:
            Shape (3, number of rows), float64: norms before, limits and coefficients.
        """
        raise NotImplementedError

    def scale_rows_(self, gradients: TensorList, coefficients: Tensor) -> None:
        """Multiply each row by its coefficient, in place; see `scale_`.

        Args:
            gradients: Gradients that `prepare_rows` has accepted.
            coefficients: One for each row, in [0, 1], float64 and contiguous.
        """
        raise NotImplementedError

    def scale_places_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """Scale as `scale_` does, also tensors that share memory with each other.

        Each place is scaled once, by the smallest coefficient of the tensors that share it.
        """
        scale_once_(self.scale_, tensors, coefficients, rows=rows)

    @abstractmethod
    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """Multiply in place, and write nothing where the coefficient rounds to 1.

        A coefficient of 0 writes zeros, also over NaN and infinity.

        Args:
            tensors: n gradients of one device and dtype, none of which shares memory with another.
            coefficients: In [0, 1], on the tensors' device, shape (1,) for one that all share or
                (n,) for one each; with ``rows`` (1,) or (number of all rows,).
            rows: One coefficient for each index of dimension 0. No two rows share memory.
        """

    @abstractmethod
    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """Limit every element to [-bound, bound] in place; write no tensor that already fits.

        The bound is rounded to the tensors' dtype. An infinite bound changes nothing, and NaN
        stays NaN.

        Args:
            tensors: n gradients of one device and dtype.
            bounds: Not negative, on the tensors' device, shape (1,) for one that all share or
                (n,) for one each; with ``rows`` (1,) or (number of all rows,).
            rows: One bound for each index of dimension 0. No two rows share memory.
        """


def root(power_sums: Tensor, order: float) -> Tensor:
    """Turn power sums into p-norms, in place."""
    return power_sums.sqrt_() if order == 2 else power_sums.pow_(1 / order)


def host_root(power_sum: float, order: float) -> float:
    """Return the p-norm of one power sum, with the bits of `root`."""
    if order == INFINITY:
        return power_sum
    if order == 2:
        return math.sqrt(power_sum)  # rounded as IEEE 754 says, as torch's is
    number: float = root(torch.tensor([power_sum], dtype=torch.float64, device="cpu"), order).item()
    return number


def are_alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether n >= 1 tensors are real and dense, of one dtype and one device."""
    facts = {*map(_FACTS, tensors)}
    if len(facts) != 1:
        return False
    [(dtype, _device, layout)] = facts
    return dtype in REAL and layout is torch.strided


def host_may_read(tensor: Tensor) -> bool:
    """Return whether the host can read the values without waiting for a device."""
    return tensor.is_cpu and (type(tensor) is Tensor or has_values(tensor))


def has_values(tensor: Tensor) -> bool:
    """Return False for a meta or fake tensor, which has a shape and no memory.

    Such tensors show what a program needs, before it runs on a machine that has it.
    """
    if type(tensor) is Tensor:
        return not tensor.is_meta
    # A DTensor is as its part on this rank.
    local = getattr(tensor, "_local_tensor", tensor)
    return not (local.is_meta or isinstance(local, FakeTensor))


def lack_values(tensors: Sequence[Tensor]) -> bool:
    """Return whether gradients of one step are meta or fake tensors, as the first of them is."""
    return len(tensors) > 0 and isinstance(tensors[0], Tensor) and not has_values(tensors[0])


def norm_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of norms: float64, or float32 if the device has no float64."""
    if device.type == "mps" or (device.type == "xpu" and not _has_float64(device)):
        return torch.float32
    return torch.float64


# Cached: a driver call, and norm_dtype() is asked several times a step.
@cache
def _has_float64(device: torch.device) -> bool:
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def rounds_to_one(coefficient: float, dtype: torch.dtype) -> bool:
    """Return whether multiplying by the coefficient leaves the gradient as it is."""
    # Products of float64 gradients are computed in float64, all others in float32 or better. Half
    # an ulp below 1 is 2**-25 in float32; the tie rounds to even, which is 1.
    return coefficient >= (1 if dtype is torch.float64 else 1 - 2.0**-25)


def rounded_bounds(bounds: Tensor, dtype: torch.dtype) -> Tensor:
    """Return bounds rounded to a dtype; finite ones stay finite, an infinite one infinite."""
    # A bound of 1e5 would become infinity in float16, and torch's clamp would leave infinities.
    rounded = bounds.clamp(max=torch.finfo(dtype).max).to(dtype).to(bounds.dtype)
    return torch.where(bounds < INFINITY, rounded, bounds)
