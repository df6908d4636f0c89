"""Bandwidth of reading memory, by a loop in C and by torch.

python -m benchmarks.cost.bandwidth
"""

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
    """Return functions that read the same `BYTES` bytes once; the loop in C needs a compiler."""
    data = torch.ones(BYTES // 4)
    functions = {"torch.dot": lambda: torch.dot(data, data)}
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is not None:
        read = _built(compiler).read_memory
        read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        functions["a loop in C"] = lambda: read(
            data.data_ptr(), BYTES, min(torch.get_num_threads(), 64)
        )
    return functions


def read_bandwidth(seconds: float) -> tuple[float, str]:
    """Return the bytes per second of the fastest reader, and its name."""
    medians = interleaved_medians(readers(), lambda: None, seconds)
    name = min(medians, key=medians.__getitem__)
    return BYTES / medians[name], name


def _built(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "bandwidth.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run([compiler, *options, SOURCE, "-o", library, "-lpthread"], check=True)
        return ctypes.CDLL(str(library))


if __name__ == "__main__":
    bandwidth, reader = read_bandwidth(2.0)
    print(f"{bandwidth / 1e9:.1f} GB/s, by {reader}")
