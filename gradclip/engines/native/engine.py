"""The engine in C for the CPU: one read at memory speed, and little else for a few small tensors.

The library beside this file knows addresses and lengths alone; what it is to know of a tensor is
found out here. It is built from ``_native.c`` at install where there is a C compiler. What has no
address, or gaps between its elements, is left to the engine of torch operators.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from struct import pack

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ...errors import EngineUnavailableError
from ..base import Engine, rounded_bounds
from ..bits import INTEGERS
from ..layout import addresses_of, flat, flat_view, table, table_view
from ..operators.engine import OPERATORS

ABI = 2
"""What the library that fits this file says of itself."""
LIBRARY = Path(__file__).with_name("_native.so")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
OK, NO_MEMORY = 0, -1
BEST = 2
"""The highest level of instruction sets."""
BATCH = 32

_NUMBERS = torch.empty(0, dtype=torch.float64, device="cpu")
_FRESH: tuple[list[Tensor], list[Tensor]] = [], []
"""Tensors for one number that nobody has yet: of shape (1,), and 0-d."""


class NativeEngine(Engine):
    """Measures with one read and writes only what changes, in C.

    Args:
        library: What `load` returns.
    """

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def unsupported(self, device: torch.device) -> str | None:
        """See `Engine.unserved`."""
        if device.type == "cpu":
            return None
        return (
            f"engine='native' serves the CPU, and there are gradients on {device}: give "
            "engine='auto', which chooses for each device."
        )

    def power_sums(self, tensors: Sequence[Tensor], order: float, *, rows: bool = False) -> Tensor:
        """See `Engine.power_sums`."""
        request, _held = _request(tensors, rows, table if rows else flat, order)
        if request:
            sums = _NUMBERS.new_empty(sum(map(len, tensors)) if rows else len(tensors))
            if _done(self._library.gradclip_power_sums(request, _address(sums))):
                return sums
        return OPERATORS.power_sums(tensors, order, rows=rows)

    def norm(self, tensors: Sequence[Tensor], order: float, *, scalar: bool = False) -> Tensor:
        """See `Engine.norm`."""
        request, _held = _request(tensors, False, flat, order)
        if request:
            norm = _new_number(scalar)
            if _done(self._library.gradclip_norm(request, _address(norm), None)):
                return norm
        return OPERATORS.norm(tensors, order, scalar=scalar)

    def norm_and_sums(self, tensors: Sequence[Tensor], order: float) -> tuple[Tensor, Tensor]:
        """See `Engine.norm_and_sums`."""
        request, _held = _request(tensors, False, flat, order)
        if request:
            norm, sums = _new_number(False), _NUMBERS.new_empty(len(tensors))
            addresses = _address(norm), _address(sums)
            if all(addresses) and _done(self._library.gradclip_norm(request, *addresses)):
                return norm, sums
        return OPERATORS.norm_and_sums(tensors, order)

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
        """Let the library write into tensors; tell whether it could."""
        request, _held = _request(tensors, rows, table_view if rows else flat_view)
        if request is None:
            return False
        flags = ctypes.create_string_buffer(len(tensors))
        if not _done(verb(request, _address(numbers), numbers.numel(), flags)):
            return False
        # Autograd cannot see what was written by address.
        increment_version([*compress(tensors, flags.raw)])
        return True


def _new_number(scalar: bool) -> Tensor:
    """Return a fresh tensor for one number.

    Made in batches: to make one costs 2 us, but among other code, which has taken its place in the
    caches, several times as much as to measure a few small gradients.
    """
    try:
        return _FRESH[scalar].pop()
    except IndexError:
        made = [_NUMBERS.new_empty(() if scalar else (1,)) for _ in range(BATCH)]
        number = made.pop()
        # What is made in inference mode, or within torch.func, is of use only there.
        if _address(number) and not number.is_inference():
            _FRESH[scalar].extend(made)
        return number


def _address(numbers: Tensor) -> int:
    """Return where numbers lie; 0, which the library refuses, where they have no memory."""
    if type(numbers) is not Tensor:
        return 0
    try:
        return numbers.data_ptr()
    except RuntimeError:  # within a transformation of torch.func
        return 0


def _done(status: int) -> bool:
    """Tell whether the library could take what lies there."""
    if status == NO_MEMORY:
        raise MemoryError("There is no memory for the sums of the gradients' parts.")
    return status == OK


_Request = tuple[bytes | None, Sequence[Tensor]]


def _request(
    tensors: Sequence[Tensor],
    rows: bool,
    seen: Callable[[Tensor], Tensor | None],
    order: float = 0.0,
) -> _Request:
    """Describe to the library what lies where, as its ``struct request``.

    Args:
        tensors: Of one dtype.
        rows: Whether row by row.
        seen: Makes what is not contiguous so, or returns None if it cannot.
        order: p of a sum.

    Returns:
        The request, None where a tensor has no memory that can be described; and the tensors that
        have this memory, to be kept as long as it is used.

    Of a call for six small tensors, 12 us in a quiet loop, this is half: 0.2 us to ask whether
    Dynamo traces, which would stop at an address; 0.3 for the types, since a subclass may have no
    memory; 0.8 whether they are contiguous, which saves looking at strides; 1.1 for the addresses
    and 1.1 for the lengths, each in one call from C; 0.9 to pack them, for which the call itself
    takes one argument less each. The rest: 1 us for ctypes, 1.5 for the sums, 1.3 for the result.
    """
    found = addresses_of(tensors, rows, seen)
    if found is None:
        return None, tensors
    numbers, held = found
    if rows:
        numbers += [view.shape[1] for view in held]
        numbers += map(len, held)
        numbers += [view.stride(0) for view in held]
    else:
        numbers += map(Tensor.numel, held)
    dtype, threads = DTYPES[tensors[0].dtype], torch.get_num_threads()
    return pack(f"3qdq{len(numbers)}q", dtype, threads, rows, order, len(held), *numbers), held


def _one_by_one(
    verb: Callable[..., None],
    otherwise: Callable[..., None],
    tensors: Sequence[Tensor],
    numbers: Tensor,
    rows: bool,
) -> None:
    """Call a verb for each tensor with its own numbers, and another for what it cannot take."""
    if len(tensors) == 1:
        otherwise(tensors, numbers, rows=rows)
        return
    counts = [len(tensor) if rows else 1 for tensor in tensors]
    each = [numbers] * len(tensors) if numbers.numel() == 1 else numbers.split(counts)
    for tensor, own in zip(tensors, each, strict=True):
        verb([tensor], own, rows=rows)


def load() -> ctypes.CDLL:
    """Load the library, with the threads of the OpenMP runtime that torch has loaded.

    Raises:
        EngineUnavailableError: It was not built, or it does not fit.
    """
    if not LIBRARY.exists():
        raise _unavailable("there was no C compiler when gradclip was installed")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        abi = library.gradclip_abi()
    except (OSError, AttributeError) as error:
        raise _unavailable(f"its library cannot be loaded ({error})") from error
    if abi != ABI:
        raise _unavailable(f"its library is of another version ({abi}, needed is {ABI})")
    request, numbers = ctypes.c_char_p, ctypes.c_void_p
    library.gradclip_power_sums.argtypes = (request, numbers)
    library.gradclip_norm.argtypes = (request, numbers, numbers)
    library.gradclip_scale.argtypes = (request, numbers, ctypes.c_int64, ctypes.c_char_p)
    library.gradclip_clamp.argtypes = (request, numbers, ctypes.c_int64, ctypes.c_char_p)
    library.gradclip_use_threads_of(_entry_of_threads())
    library.gradclip_choose(BEST)
    return library


def _entry_of_threads() -> ctypes.c_void_p:
    """Find what starts threads in the OpenMP runtime that torch runs on; null where none does.

    Looked up among what torch's own library depends on, and loaded already: any other runtime
    would bring threads of its own.
    """
    try:
        torch_library = ctypes.CDLL(torch._C.__file__, os.RTLD_NOLOAD | os.RTLD_LAZY)
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return ctypes.c_void_p(None)


def _unavailable(reason: str) -> EngineUnavailableError:
    return EngineUnavailableError(
        f"engine='native' is not available: {reason}. Install a C compiler (Debian: apt-get "
        "install gcc), then gradclip again with 'pip install --force-reinstall --no-deps "
        "--no-binary gradclip gradclip'; or give engine='auto', which takes torch operators."
    )
