"""How fast memory can be read at all, by a loop in C; without a compiler, by torch."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.timing import interleaved_medians

SOURCE = Path(__file__).with_name("bandwidth.c")
BYTES = 512 << 20


def readers() -> dict[str, Callable[[], object]]:
    """Return ways to read the same `BYTES` bytes once."""
    data = torch.ones(BYTES // 4)
    found = {"torch.dot": lambda: torch.dot(data, data)}
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is not None:
        read = _built(compiler).read_memory
        read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        found["a loop in C"] = lambda: read(
            data.data_ptr(), BYTES, min(torch.get_num_threads(), 64)
        )
    return found


def read_bandwidth(seconds: float) -> tuple[float, str]:
    """Return bytes per second of the fastest reader, and which that was."""
    medians = interleaved_medians(readers(), lambda: None, seconds)
    name = min(medians, key=medians.__getitem__)
    return BYTES / medians[name], name


def _built(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, SOURCE, "-o", library, "-lpthread"], check=True)
        return ctypes.CDLL(str(library))
