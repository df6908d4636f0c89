"""Cost of clipping on an NVIDIA GPU beside torch's clip_grad_norm_, and the error of the norm.

    python -m benchmarks.cuda.run [--sets gpt2 tiny] [--seconds 5] [--no-training] [--no-compile]
                              [--json] [--output benchmarks/results/h200.md]

Calls of the rivals are interleaved in one process; figures are medians. Gradients are rewritten
before every timed call, outside the timed part, so that the caches hold the last written bytes, as
after a backward pass. The threshold is 1, and gradients have a norm of 2 ("clipping") or 0.5
("under"); "norm" is the norm alone.

The time on the device is the time between two CUDA events with all work waiting in the queue. The
time on the host is the time until the call returns, beginning with an idle device. The share of
bandwidth is

    passes * bytes of all gradients / time on the device / copy bandwidth,

where passes counts the necessary passes: 1 for the norm and under the threshold (one read), 3 for
clipping (two reads, one write). The copy bandwidth is 2 * bytes / time of the fastest large
``copy_`` in the same run. A share may exceed 100 %: reading can be faster than copying, and bytes
in a cache need no read.

Without a GPU the same code runs on toys on the CPU, with gradclip's Triton engine if
TRITON_INTERPRET=1 is set. Those figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gradclip
from benchmarks.common import shapes
from benchmarks.common.gradients import Still
from benchmarks.cuda import report as cuda_report
from benchmarks.cuda import training as cuda_training
from benchmarks.cuda.rivals import MAX_NORM, DeviceGradients, Step, clipping_rivals
from benchmarks.cuda.timing import copy_bandwidth, device_and_host_medians, synchronize
from gradclip import engines

NORMS = {"norm": 1.0, "under": MAX_NORM / 2, "clipping": MAX_NORM * 2}
"""Norm of the gradients, by regime."""
PASSES = {"norm": 1, "under": 1, "clipping": 3}
"""Necessary passes over the gradients, by regime."""


@dataclass(frozen=True)
class GradientSet:
    """Shapes of a model's gradients, and of a small model of the same kind."""

    shapes: Callable[[], list[shapes.Shape]]
    toy: Callable[[], list[shapes.Shape]]
    dtype: torch.dtype = torch.float32


SETS = {
    "gpt2": GradientSet(shapes.gpt2, functools.partial(shapes.gpt2, 1, 8, 32, 16)),
    "gpt2-xl": GradientSet(shapes.gpt2_xl, functools.partial(shapes.gpt2, 2, 16, 32, 16)),
    "llama3-8b": GradientSet(
        shapes.llama3, functools.partial(shapes.llama3, 1, 16, 8, 32, 32), torch.bfloat16
    ),
    "tiny": GradientSet(shapes.tiny, functools.partial(shapes.tiny, 10)),
}


def share_of_bandwidth(regime: str, size: int, seconds: float, bandwidth: float) -> float:
    """Return the bandwidth of the necessary passes as a share of the copy bandwidth.

    Args:
        regime: "norm", "under" or "clipping".
        size: Bytes of all gradients.
        seconds: Time on the device.
        bandwidth: Bytes per second.
    """
    return PASSES[regime] * size / seconds / bandwidth


def measure_set(
    name: str, device: torch.device, seconds: float, bandwidth: float, *, compiles: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the rows of all regimes on one set, and the reason for each missing rival.

    Args:
        name: Name in `SETS`.
        device: The device; on the CPU, toys are measured.
        seconds: Duration of each regime.
        bandwidth: Copy bandwidth in bytes per second.
        compiles: Whether to try torch.compile.
    """
    chosen = SETS[name]
    on_device = device.type == "cuda"
    gradients = DeviceGradients(
        chosen.shapes() if on_device else chosen.toy(), chosen.dtype, device
    )
    optimizer = Still(gradients.parameters)
    rows = []
    with gradclip.GradientClipper(optimizer, MAX_NORM):
        clipping, missing = clipping_rivals(gradients, optimizer.step, compiles=compiles)
        for regime in NORMS:
            rivals = norm_rivals(gradients) if regime == "norm" else clipping
            measured = measure_regime(regime, gradients, rivals, seconds, bandwidth)
            rows.append(
                {"set": name, "dtype": str(chosen.dtype).removeprefix("torch."), **measured}
            )
            summary = {key: rows[-1][key] for key in ("set", "regime", "device_ms", "host_us")}
            print(json.dumps(summary), file=sys.stderr, flush=True)
    return rows, missing


def norm_rivals(gradients: DeviceGradients) -> dict[str, Step]:
    """Return calls that measure the norm alone."""
    return {
        "torch": lambda: torch.nn.utils.get_total_norm(gradients.tensors),
        "gradclip": lambda: gradclip.get_total_norm(gradients.tensors),
    }


def measure_regime(
    regime: str,
    gradients: DeviceGradients,
    rivals: dict[str, Step],
    seconds: float,
    bandwidth: float,
) -> dict[str, Any]:
    """Return the measurements of rivals on gradients of one norm."""
    device = gradients.parameters[0].device
    gradients.draw(NORMS[regime])
    on_device, on_host = device_and_host_medians(rivals, gradients.rewrite, seconds, device)
    gradients.rewrite()
    size = gradients.bytes
    return {
        "regime": regime,
        "elements": gradients.elements,
        "bytes": size,
        "device_ms": {name: taken * 1e3 for name, taken in on_device.items()},
        "host_us": {name: taken * 1e6 for name, taken in on_host.items()},
        "device_ratio": ratios(on_device),
        "host_ratio": ratios(on_host),
        "share": {
            name: share_of_bandwidth(regime, size, taken, bandwidth)
            for name, taken in on_device.items()
        },
        "error": {
            "torch": gradients.error(torch.nn.utils.get_total_norm),
            "gradclip": gradients.error(),
        },
    }


def ratios(taken: dict[str, float]) -> dict[str, float]:
    """Return times as ratios to torch's time."""
    return {name: seconds / taken["torch"] for name, seconds in taken.items()}


@contextlib.contextmanager
def engine_under_test(device: torch.device) -> Iterator[None]:
    """Let the interpreted Triton engine serve the CPU, if it is asked for."""
    chosen = engines._BEST
    if device.type == "cpu" and cuda_report.interpreted():
        engines._BEST = {"cpu": engines.engine_for("triton", device)}
    try:
        yield
    finally:
        engines._BEST = chosen


def measure(result: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
    """Fill in the result step by step: if one fails, the rows before it are still reported."""
    bandwidth = copy_bandwidth(device, options.seconds / 2)
    result["copy_bandwidth"] = bandwidth
    for name in options.sets:
        rows, missing = measure_set(
            name, device, options.seconds, bandwidth, compiles=options.compile
        )
        result["rows"] += rows
        result["missing"][name] = missing
        gc.collect()
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.training:
        size = cuda_training.FULL if device.type == "cuda" else cuda_training.TOY
        seconds = 6 * options.seconds
        result["training"] = cuda_training.measure_training(seconds, device, size)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seconds", type=float, default=5.0, help="per set and regime")
    parser.add_argument("--no-training", dest="training", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help="also write the Markdown to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure and print. If a measurement fails, print those before it."""
    options = parsed(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with engine_under_test(device):
        result: dict[str, Any] = {"machine": cuda_report.machine(device), "rows": []}
        result.update(missing={}, training={})
        try:
            measure(result, options, device)
        finally:
            result["targets"] = cuda_report.targets(result)
            text = cuda_report.markdown(result)
            if options.output is not None:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(text + "\n")
            print(json.dumps(result) if options.json else text)


if __name__ == "__main__":
    main()
