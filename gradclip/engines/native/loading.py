"""Loading of the C library: its file, its functions, and what it is handed of Python and torch.

Wheels bring the library, beside this file, for common platforms; elsewhere it is built from
``_native.c`` at install. It is linked neither to Python nor to torch: their functions, and those of
torch's OpenMP runtime, are looked up here.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import Struct

import torch
from torch import Tensor, nn

from ...errors import EngineUnavailableError

ABI = 7
"""The version of the library's functions that Python calls."""
LIBRARY = Path(__file__).with_name("_native.so")
THREAD_NUMBER = "omp_get_thread_num"
GNU = ("GOMP_parallel", THREAD_NUMBER)
"""What GNU's OpenMP runtime starts threads and numbers them with."""
LLVM = (
    *("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num"),
    THREAD_NUMBER,
)
"""The same for a runtime without GOMP_parallel, as torch has on Windows."""
WINDOWS_RUNTIME = "libiomp5md.dll"
ELF_HEADER = Struct("<40xQ10x2H2x")
"""Of 64 bits: where the table of sections begins, and the size and number of its entries."""
BEST = 2
"""The highest level of instruction sets."""


def load() -> ctypes.CDLL:
    """Load the library and give it the threads of the OpenMP runtime that torch has loaded.

    Raises:
        EngineUnavailableError: The library was not built, cannot be loaded, or has another ABI.
    """
    if not LIBRARY.exists():
        raise _unavailable("gradclip was installed without its library")
    try:
        if not _is_whole(LIBRARY.read_bytes()):
            raise OSError(f"{LIBRARY} is cut off; was the disk full?")
        library = ctypes.CDLL(str(LIBRARY))
        abi = library.gradclip_abi()
    except (OSError, AttributeError) as error:
        raise _unavailable(f"its library cannot be loaded ({error})") from error
    if abi != ABI:
        raise _unavailable(f"its library is of another version ({abi}, needed is {ABI})")
    request = numbers = ctypes.c_void_p
    library.gradclip_power_sums.argtypes = (request, numbers)
    library.gradclip_norm.argtypes = (request, numbers, numbers)
    library.gradclip_apart.argtypes = (request,)
    library.gradclip_scale.argtypes = (request, numbers, ctypes.c_int64, ctypes.c_char_p)
    library.gradclip_scale_all.argtypes = (request, ctypes.c_double)
    library.gradclip_clip.argtypes = (request, ctypes.c_double, numbers)
    library.gradclip_rows.argtypes = (request, request)
    library.gradclip_rows.restype = ctypes.c_int64
    switches = ctypes.c_int, ctypes.c_int
    library.gradclip_clip_rows.argtypes = (
        *(request, request, numbers, *switches, numbers, ctypes.c_char_p),
    )
    library.gradclip_clamp.argtypes = (request, numbers, ctypes.c_int64, ctypes.c_char_p)
    _give_threads(library)
    library.gradclip_choose(BEST)
    return library


def _is_whole(library: bytes) -> bool:
    """Whether an ELF file ends where its table of sections does.

    Linux loads a library that has been cut off, and its first use ends the process; other systems
    refuse it by themselves.
    """
    if library[:5] != b"\x7fELF\2":
        return True
    if len(library) < ELF_HEADER.size:
        return False
    sections, size, count = ELF_HEADER.unpack_from(library)
    return bool(sections + size * count <= len(library))


class _ExchangeApi(ctypes.Structure):
    """``DLPackExchangeAPI`` of DLPack 1: functions of torch for code in C."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("major", "minor")),
        *((name, ctypes.c_void_p) for name in ("older", "allocate", "export", "take")),
        ("describe", ctypes.c_void_p),
    ]


class _Interpreter(ctypes.Structure):
    """``struct interpreter`` of the library."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            *("list_size", "list_item", "type_of", "release", "clear_error"),
            *("describe", "tensor_type", "parameter_type"),
        )
    ]


def walker(library: ctypes.CDLL) -> Callable[..., int] | None:
    """Return the library's function that walks a list of tensors; None for a torch before 2.10."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    api = ctypes.pythonapi
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", api)
    )
    exchange = _ExchangeApi.from_address(pointer_of(capsule, b"dlpack_exchange_api"))
    if exchange.major != 1 or not exchange.describe:
        return None
    functions = api.PyList_Size, api.PyList_GetItem, api.PyObject_Type, api.Py_DecRef
    addresses = [ctypes.cast(function, ctypes.c_void_p) for function in functions]
    clear = ctypes.cast(api.PyErr_Clear, ctypes.c_void_p)
    types = id(Tensor), id(nn.Parameter)
    interpreter = _Interpreter(*addresses, clear, exchange.describe, *types)
    library.gradclip_use_interpreter(ctypes.byref(interpreter))
    # PyDLL keeps the interpreter's lock during the call, which takes about a microsecond.
    walk = ctypes.PyDLL(str(LIBRARY)).gradclip_walk
    numbers = ctypes.c_int64, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    walk.argtypes = (ctypes.py_object, ctypes.c_void_p, *numbers)
    return walk


def _give_threads(library: ctypes.CDLL) -> None:
    """Let the library use the threads of torch's own OpenMP runtime, one thread if it has none.

    Looked up in the libraries that torch has loaded already: another runtime would start threads
    of its own, which compete with torch's for the cores.
    """
    library.gradclip_use_threads_of(None, None)
    with suppress(OSError, AttributeError):
        runtime = _runtime_of_torch()
        gnu = hasattr(runtime, GNU[0])
        functions = [getattr(runtime, name) for name in (GNU if gnu else LLVM)]
        use = library.gradclip_use_threads_of if gnu else library.gradclip_use_llvm_threads
        use(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


def _runtime_of_torch() -> ctypes.CDLL:
    """Return what finds the functions of torch's OpenMP runtime, without loading anything."""
    if sys.platform == "win32":
        kernel = ctypes.WinDLL("kernel32")
        kernel.GetModuleHandleW.restype = ctypes.c_void_p
        handle = kernel.GetModuleHandleW(WINDOWS_RUNTIME)
        if handle is None:
            raise OSError(f"{WINDOWS_RUNTIME} is not loaded")
        return ctypes.CDLL(WINDOWS_RUNTIME, handle=handle)
    # Through a handle of this library functions of all that it depends on are found.
    return ctypes.CDLL(torch._C.__file__, os.RTLD_NOLOAD | os.RTLD_LAZY)


def _unavailable(reason: str) -> EngineUnavailableError:
    return EngineUnavailableError(
        f"engine='native' is not available: {reason}. Install gradclip again with 'pip install "
        "--force-reinstall --no-deps gradclip', which brings the library for common platforms and "
        "builds it elsewhere if there is a C compiler (Debian: apt-get install gcc); or give "
        "engine='auto', which takes torch operators."
    )
