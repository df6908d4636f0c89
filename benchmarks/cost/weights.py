"""Time and memory that norms of weights add to the step that measures them.

    python -m benchmarks.cost.weights [--sets LSTM ...] [--seconds 20]

AdamW steps with a clipper whose sink keeps steps in memory, without norms of weights and, with
``weights_every=1``, with those of every step. Memory is what the process held at most during a
step, less what it held before it. Linux tells and resets that number.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common.gradients import Gradients, machine
from benchmarks.common.shapes import gpt2, lstm, resnet50, small
from benchmarks.common.timing import interleaved_medians
from gradclip import GradientClipper, MemorySink
from gradclip.report.printing import print_table

SETS = {"small": small, "LSTM": lstm, "ResNet-50": resnet50, "GPT-2 124M": gpt2}
MIB = 2**20


def stepping(gradients: Gradients, every: int) -> Callable[[], object]:
    """Return the step of an optimizer of the parameters."""
    optimizer = torch.optim.AdamW(gradients.parameters, lr=1e-3, fused=True)
    GradientClipper(optimizer, 1e9, log=MemorySink(weights_every=every))
    return optimizer.step


def memory_of(step: Callable[[], object]) -> int:
    """Return how many bytes more the process holds at most during a step than before it."""
    ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed would count before, too
    Path("/proc/self/clear_refs").write_text("5")
    before = _held("VmRSS")
    step()
    return _held("VmHWM") - before


def _held(name: str) -> int:
    [kilobytes] = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args(argv)
    rows = []
    for name in options.sets:
        gradients = Gradients(SETS[name](), torch.float32)
        gradients.rewrite()
        without, measuring = stepping(gradients, 0), stepping(gradients, 1)
        named = {"without": without, "with": measuring}
        seconds = interleaved_medians(named, lambda: None, options.seconds / len(options.sets))
        memory = {key: min(memory_of(step) for _ in range(3)) / MIB for key, step in named.items()}
        ratio = seconds["with"] / seconds["without"]
        weights = gradients.bytes / MIB
        added = memory["with"] - memory["without"]
        milliseconds = f"{seconds['without'] * 1e3:.2f}"
        rows.append((name, milliseconds, f"{ratio:.2f}", f"{weights:.1f}", f"{added:.1f}"))
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    header = ("set", "ms a step", "with norms of weights", "weights, MiB", "added, MiB")
    print_table(header, rows, sys.stdout)


if __name__ == "__main__":
    main()
