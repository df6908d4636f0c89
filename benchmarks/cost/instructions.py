"""Instructions of a call on the small set, counted by Callgrind.

    python -m benchmarks.cost.instructions [--calls 64]

Counts repeat to within 2 %. This needs valgrind (Debian: apt-get install valgrind) and a few
minutes, because it emulates a processor, one without AVX-512. Only warm calls on one thread are
counted, without the loop around them.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import gradclip
from benchmarks.common.gradients import Gradients, Still
from benchmarks.common.markdown import table
from benchmarks.common.shapes import SETS
from gradclip import engines

SUMMARY = re.compile(r"^(?:summary|totals): (\d+)", re.MULTILINE)
WARMING = 20
MISSING = "valgrind is not installed: install it (Debian: apt-get install valgrind)."


def available() -> bool:
    """Return whether valgrind is installed."""
    return shutil.which("valgrind") is not None


def count(calls: int = 64) -> dict[str, float]:
    """Return the instructions of one call by rival."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.cost.instructions",
        "--inside",
        "--calls",
        str(calls),
    ]
    options = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        subprocess.run(
            [*valgrind, f"--callgrind-out-file={folder}/out", *command],
            env={**os.environ, **options},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        dumps = sorted(Path(folder).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        counted = [int(SUMMARY.findall(path.read_text())[-1]) for path in dumps]
    names = list(rivals())
    loop, *others = counted[: len(names)]
    return {name: (n - loop) / calls for name, n in zip(names[1:], others, strict=True)}


def rivals() -> Mapping[str, Callable[[], object]]:
    """Return the calls to count; the first one, which does nothing, measures the loop."""
    gradients = Gradients(SETS["small"](), torch.float32)
    gradients.rewrite()
    parameters = gradients.parameters
    optimizer, bare = Still(parameters), Still(parameters)
    optimizer.clipper = gradclip.GradientClipper(optimizer, 1e9)
    return {
        "nothing": lambda: None,
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9),
        "function": lambda: gradclip.clip_grad_norm_(parameters, 1e9),
        "function, torch operators": lambda: gradclip.clip_grad_norm_(parameters, 1e9),
        "empty step": bare.step,
        "hook": optimizer.step,
    }


def run_inside(calls: int) -> None:
    """Run all rivals under Callgrind, which dumps its count after each."""
    gc.disable()  # a collection would be counted for whichever rival it falls into
    chosen = dict(engines._BEST)
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True)
    for name, rival in rivals().items():
        engines._BEST = {} if name.endswith("torch operators") else chosen
        for _ in range(WARMING):
            rival()
        torch._C._valgrind_toggle()
        for _ in range(calls):
            rival()
        torch._C._valgrind_toggle_and_dump_stats()


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        run_inside(options.calls)
        return
    if not available():
        sys.exit(MISSING)
    print("\n".join(table_lines(count(options.calls))))


def table_lines(counted: Mapping[str, float]) -> list[str]:
    """Return the lines of a Markdown table."""
    return table(
        ["small set, under the threshold", "instructions of a call", "ratio"],
        [
            [name, f"{number:,.0f}", f"{number / counted['torch']:.2f}"]
            for name, number in counted.items()
        ],
    )


if __name__ == "__main__":
    main()
