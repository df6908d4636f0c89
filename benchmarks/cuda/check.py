"""What a machine with a GPU is to run, within six minutes: tests of the device, then the benchmark.

    python -m benchmarks.cuda.check [--output benchmarks/results/cuda.md] [--seconds 1]
        [options of benchmarks.cuda.run]

The tests that need a GPU come first, those of the kernels and of whole clippers; then
`benchmarks.cuda.run` on three sets. Each part has a time limit, and what it printed until then is
kept. Without a GPU the tests are skipped and the benchmark runs on toys, with interpreted kernels.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from benchmarks.common.markdown import save

TESTS = (
    "tests/internals/engines/test_triton.py",
    "tests/contracts/engines/test_contract.py",
    "tests/behaviour/devices",
    "tests/logging/test_replays.py",
)
SETS = ("gpt2", "llama3-8b", "tiny")
TESTS_SECONDS, BENCHMARK_SECONDS = 150, 180
"""Time limits, together below six minutes."""


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Return the exit status and what was printed; 124 where the time ran out."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired as late:
        printed = late.stdout or b""
        return 124, printed.decode() if isinstance(printed, bytes) else printed
    return done.returncode, done.stdout if done.stdout.strip() else done.stderr


def main(argv: list[str] | None = None) -> int:
    """Run both parts, write the report, and return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seconds", type=float, default=1.0, help="per set and regime")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cuda.md"))
    options, others = parser.parse_known_args(argv)
    tests = ["pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda and not slow", *options.tests]
    tested, printed = run(tests, TESTS_SECONDS)
    failures = [line for line in printed.splitlines() if line.startswith(("FAILED", "ERROR"))]
    benchmark = ["benchmarks.cuda.run", "--seconds", str(options.seconds), "--sets", *options.sets]
    benchmark += others
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    measured, tables = run(benchmark, BENCHMARK_SECONDS, **interpreted)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [
        "# On a GPU",
        "",
        f"Written by `make device-check` on {date.today()}: {device}, torch {torch.__version__}.",
        "",
        "Tests: " + (printed.strip().splitlines() or ["nothing was printed"])[-1],
        *(f"- {line}" for line in failures),
        "" if tested != 124 else "\nThe time for the tests ran out.\n",
        tables.strip(),
        "" if measured != 124 else "\nThe time for the benchmark ran out.",
    ]
    print("\n".join(lines))
    save(lines, options.output)
    return int(tested not in (0, 5) or measured != 0)


if __name__ == "__main__":
    sys.exit(main())
