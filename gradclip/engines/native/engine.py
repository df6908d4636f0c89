"""The engine in C for the CPU: one read at memory speed, and little overhead for small tensors.

The library, which ``loading.py`` loads, works on addresses and lengths. It finds those of plain
gradients; this module finds all others. Tensors without an address, and writes to tensors with gaps
between their elements, go to torch operators.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from itertools import compress
from struct import pack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..base import INTEGERS, Engine, RelativeLimit, TensorList, rounded_bounds
from ..layout import addresses_of, flat, flat_view, table, table_view
from ..operators.engine import OPERATORS
from .loading import walker

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
OK, CHANGED, NO_MEMORY, LOW_ADDRESS = 0, 1, -1, -3
HEADER = 5
"""Numbers of a request before its table of addresses and lengths."""
SPARE = 32
"""Tensors for a norm to make at a time."""

_FLOAT64 = torch.empty(0, dtype=torch.float64, device="cpu")
"""A prototype: ``new_empty`` is faster than ``torch.empty`` with a dtype and a device."""
_SPARE: tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]] = [], []
"""Tensors for one norm that are not in use yet, with their addresses: of shape (1,), and 0-d."""


class NativeEngine(Engine):
    """Measures with one read and writes only what changes, in C.

    Args:
        library: The result of `load`.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._walk = walker(library)

    def unsupported(self, device: torch.device) -> str | None:
        """See `Engine.unsupported`."""
        if device.type == "cpu":
            return None
        return (
            f"engine='native' serves the CPU, and there are gradients on {device}: give "
            "engine='auto', which chooses for each device."
        )

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        request, _stored = _request(tensors, rows, table if rows else flat, order)
        if request:
            sums = _FLOAT64.new_empty(sum(map(len, tensors)) if rows else len(tensors))
            if _done(self._library.gradclip_power_sums(request, _address(sums))):
                return sums
        return OPERATORS.power_sums(tensors, order, rows=rows)

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        request, _stored = _request(tensors, False, flat, order)
        if request:
            norm, address = _new_number(scalar)
            if _done(self._library.gradclip_norm(request, address, None)):
                return norm
        return OPERATORS.norm(tensors, order, scalar=scalar)

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """See `Engine.norm_and_sums`."""
        request, _stored = _request(tensors, False, flat, order)
        if request:
            (norm, address), sums = _new_number(False), _FLOAT64.new_empty(len(tensors))
            addresses = address, _address(sums)
            if all(addresses) and _done(self._library.gradclip_norm(request, *addresses)):
                return norm, sums
        return OPERATORS.norm_and_sums(tensors, order)

    def prepare(self, tensors: TensorList, order: float) -> bool:
        """See `Engine.prepare`."""
        status = LOW_ADDRESS if self._walk is None else self._walked(self._walk, tensors, order)
        if status != LOW_ADDRESS:
            return status == OK or _done(status)
        if not super().prepare(tensors, order):
            return False
        tensors.note, _stored = _request(tensors, False, flat_view, order)
        return tensors.note is not None and _done(self._library.gradclip_apart(tensors.note))

    def host_norm(self, tensors: TensorList, order: float, sums: Tensor | None = None) -> float:
        """See `Engine.host_norm`."""
        norm = ctypes.c_double()
        address = None if sums is None else _address(sums)
        if address == 0:
            return super().host_norm(tensors, order, sums)
        status = self._library.gradclip_norm(tensors.note, ctypes.byref(norm), address)
        if status != OK:
            _done(status)  # raises: no memory is left
        return norm.value

    def host_power_sums(self, tensors: TensorList, order: float) -> Tensor:
        """See `Engine.host_power_sums`."""
        sums = _FLOAT64.new_empty(len(tensors))
        if not _done(self._library.gradclip_power_sums(tensors.note, _address(sums))):
            return super().host_power_sums(tensors, order)
        return sums

    def host_scale_(self, tensors: TensorList, coefficient: float) -> None:
        """See `Engine.host_scale_`."""
        # Needs no memory, and all tensors have an address: it cannot fail.
        if self._library.gradclip_scale_all(tensors.note, coefficient) == CHANGED:
            increment_version(tensors)

    def host_clip_(self, tensors: TensorList, threshold: float, order: float) -> Tensor:
        """See `Engine.host_clip_`."""
        norm, address = _new_number(scalar=True)
        if not address:
            return super().host_clip_(tensors, threshold, order)
        status = self._library.gradclip_clip(tensors.note, threshold, address)
        if status == CHANGED:
            increment_version(tensors)
        elif status != OK:
            _done(status)  # raises: no memory is left
        return norm

    def prepare_rows(
        self, gradients: TensorList, weights: TensorList, order: float, *, rows: bool
    ) -> int:
        """See `Engine.prepare_rows`."""
        if self._walk is None:
            return 0
        for tensors in (gradients, weights):
            if not _done(self._walked(self._walk, tensors, order, rows)):
                return 0
        if not _address(_FLOAT64.new_empty(1)):
            return 0  # inside a transformation of torch.func new tensors have no memory
        return self._library.gradclip_rows(gradients.note, weights.note)  # type: ignore[no-any-return]

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
        """See `Engine.clip_rows_`."""
        requests: Any = gradients.note, weights.note
        results = _FLOAT64.new_empty((3, self._library.gradclip_rows(*requests)))
        numbers, flags = (ctypes.c_double * 4)(*limit), (ctypes.c_char * len(gradients))()
        options = numbers, erase, write, _address(results), flags
        _done(self._library.gradclip_clip_rows(*requests, *options))
        _mark_written(gradients, flags.raw)
        return results

    def scale_rows_(self, gradients: TensorList, coefficients: Tensor) -> None:
        """See `Engine.scale_rows_`."""
        flags = (ctypes.c_char * len(gradients))()
        numbers = coefficients.data_ptr(), len(coefficients)
        _done(self._library.gradclip_scale(gradients.note, *numbers, flags))
        _mark_written(gradients, flags.raw)

    def _walked(
        self, walk: Callable[..., int], tensors: TensorList, order: float, by_rows: bool = False
    ) -> int:
        """Note the library's request for tensors, or for their rows; return the status."""
        count = len(tensors)
        request = (ctypes.c_int64 * (HEADER + (4 if by_rows else 2) * count))()
        tensors.note = request
        return walk(tensors, request, count, torch.get_num_threads(), order, by_rows)

    def scale_(
        self, tensors: Sequence[Tensor], coefficients: Tensor, *, rows: bool = False
    ) -> None:
        """See `Engine.scale_`."""
        if coefficients.dtype is not torch.float64 or not coefficients.is_contiguous():
            coefficients = coefficients.to(torch.float64).contiguous()
        if not self._written(self._library.gradclip_scale, tensors, coefficients, rows):
            _one_by_one(self.scale_, OPERATORS.scale_, tensors, coefficients, rows)

    def clamp_(self, tensors: Sequence[Tensor], bounds: Tensor, *, rows: bool = False) -> None:
        """See `Engine.clamp_`."""
        dtype = tensors[0].dtype
        rounded = rounded_bounds(bounds, dtype).to(dtype)
        bits = rounded.view(INTEGERS[rounded.element_size()]).to(torch.int64)
        if not self._written(self._library.gradclip_clamp, tensors, bits, rows):
            _one_by_one(self.clamp_, OPERATORS.clamp_, tensors, bounds, rows)

    def _written(
        self, verb: Callable[..., int], tensors: Sequence[Tensor], numbers: Tensor, rows: bool
    ) -> bool:
        """Let the library write into tensors; return whether it could."""
        request, _stored = _request(tensors, rows, table_view if rows else flat_view)
        if request is None:
            return False
        flags = ctypes.create_string_buffer(len(tensors))
        if not _done(verb(request, _address(numbers), numbers.numel(), flags)):
            return False
        _mark_written(tensors, flags.raw)
        return True


def _mark_written(tensors: Sequence[Tensor], flags: bytes) -> None:
    """Tell autograd, which cannot see writes by address, of the tensors with a flag of 1."""
    if any(flags):
        increment_version([*compress(tensors, flags)])


def _new_number(scalar: bool) -> tuple[Tensor, int]:
    """Return an unused tensor for one number, and its address as `_address` does.

    Made many at a time: one costs 2 us in a loop, but inside a training step, with cold caches,
    several times what measuring a few small gradients costs.
    """
    try:
        return _SPARE[scalar].pop()
    except IndexError:
        made = [_FLOAT64.new_empty(() if scalar else (1,)) for _ in range(SPARE)]
        located = [(number, _address(number)) for number in made]
        number, address = located.pop()
        # Tensors made in inference mode, or inside torch.func, cannot be used outside.
        if address and not number.is_inference():
            _SPARE[scalar].extend(located)
        return number, address


def _address(numbers: Tensor) -> int:
    """Return the address of numbers; 0, which the library refuses, if they have no memory."""
    if type(numbers) is not Tensor:
        return 0
    try:
        return numbers.data_ptr()
    except RuntimeError:  # inside a transformation of torch.func
        return 0


def _done(status: int) -> bool:
    """Return whether the library did its work; False if a tensor has no address."""
    if status == NO_MEMORY:
        raise MemoryError("No memory is left for the partial sums of the gradients.")
    return status == OK


_Request = tuple[bytes | None, Sequence[Tensor]]


def _request(
    tensors: Sequence[Tensor],
    rows: bool,
    view: Callable[[Tensor], Tensor | None],
    order: float = 0.0,
) -> _Request:
    """Pack addresses and lengths as the library's ``struct request``.

    Args:
        tensors: Tensors of one dtype.
        rows: Whether each index of dimension 0 has a number of its own.
        view: Returns a contiguous form of a tensor, or None if there is none.
        order: p of a sum.

    Returns:
        The request, None if a tensor has no usable address; and the tensors at these addresses,
        which the caller must keep alive while it uses them.

    For six small tensors this is half of a call that takes 12 us in a quiet loop: 0.2 us to ask
    whether Dynamo traces, which cannot trace an address; 0.3 for the types, since a subclass may
    have no memory; 0.8 to ask whether they are contiguous, which saves reading strides; 1.1 for
    the addresses and 1.1 for the lengths, each in one loop in C; 0.9 to pack them, which saves
    ctypes several arguments. The rest: 1 us for ctypes, 1.5 for the sums, 1.3 for the result.
    """
    located = addresses_of(tensors, rows, view)
    if located is None:
        return None, tensors
    numbers, stored = located
    if rows:
        numbers += [matrix.shape[1] for matrix in stored]
        numbers += map(len, stored)
        numbers += [matrix.stride(0) for matrix in stored]
    else:
        numbers += map(Tensor.numel, stored)
    dtype, threads = DTYPES[tensors[0].dtype], torch.get_num_threads()
    return pack(f"3qdq{len(numbers)}q", dtype, threads, rows, order, len(stored), *numbers), stored


def _one_by_one(
    verb: Callable[..., None],
    operators_verb: Callable[..., None],
    tensors: Sequence[Tensor],
    numbers: Tensor,
    rows: bool,
) -> None:
    """Call a verb for each tensor with its numbers; for a single one, that of torch operators."""
    if len(tensors) == 1:
        operators_verb(tensors, numbers, rows=rows)
        return
    counts = [len(tensor) if rows else 1 for tensor in tensors]
    shared = numbers.numel() == 1
    by_tensor = [numbers] * len(tensors) if shared else numbers.split(counts)
    for tensor, tensor_numbers in zip(tensors, by_tensor, strict=True):
        verb([tensor], tensor_numbers, rows=rows)
