"""Cost of clipping beside torch's clip_grad_norm_, and the error of the norm.

    python -m benchmarks.cost.clip [--sets small lstm] [--seconds 5] [--runs 5] [--instructions]
        [--json] [--save benchmarks/results/cost.md]

Times are printed as ratios to torch's default in the same run: on a shared machine only ratios have
a meaning. Gradients are rewritten from a pool before every timed call. "hook" is a whole step of an
optimizer that does nothing, record included; "function" is gradclip's function, both with the
engine that serves the CPU; "operators" is the function with torch operators.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gradclip
from benchmarks.common.gradients import Gradients, Still, machine
from benchmarks.common.markdown import save, table
from benchmarks.common.shapes import SETS
from benchmarks.common.timing import interleaved_medians
from benchmarks.cost import instructions
from benchmarks.cost.bandwidth import read_bandwidth
from gradclip import engines
from gradclip.engines import engine_for
from gradclip.thresholds import (
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    ZScore,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
REGIMES = {"under": 1e9, "clipping": 1.0}
RIVALS = ("hook", "function", "operators", "foreach")
RULES: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "ZScore": ZScore,
    "MovingAverage": MovingAverage,
    "MovingAverage(warmup_norm=1e9)": lambda: MovingAverage(warmup_norm=1e9),
    "MeanDeviation(6)": MeanDeviation,
    "MedianDeviation(10)": MedianDeviation,
    "Percentile(10)": Percentile,
    "Percentile(10, factor=2)": lambda: Percentile(factor=2),
}
"""Rules as they were published; those that clip here once more such that they clip nothing."""
BUSY = {"60 of 4,096": [(4096,)] * 60, "16 of 65,536": [(65536,)] * 16}
"""Shapes that are measured beside a busy program, by name."""


def measure_set(name: str, dtype: str, seconds: float, bandwidth: float) -> list[dict[str, Any]]:
    """Measure both regimes on one set of gradients."""
    gradients = Gradients(SETS[name](), DTYPES[dtype])
    rows = []
    for regime, max_norm in REGIMES.items():
        medians = medians_of_rivals(gradients, max_norm, seconds)
        reference = medians["torch"]
        gradients.rewrite()
        rows.append(
            {
                "set": name,
                "dtype": dtype,
                "regime": regime,
                "torch_us": reference * 1e6,
                **{name: medians[name] / reference for name in RIVALS},
                "read_share": gradients.bytes / medians["engine"] / bandwidth,
                "error": gradients.error(),
            }
        )
    return rows


def medians_of_rivals(gradients: Gradients, max_norm: float, seconds: float) -> dict[str, float]:
    """Return the median times of torch's and gradclip's ways to clip to one threshold."""
    parameters = gradients.parameters
    optimizer = Still(parameters)
    torch_clip = torch.nn.utils.clip_grad_norm_
    tensors = [parameter.grad for parameter in parameters]
    serving = engine_for("auto", torch.device("cpu"))
    rivals = {
        "torch": lambda: torch_clip(parameters, max_norm),
        "foreach": lambda: torch_clip(parameters, max_norm, foreach=True),
        "function": lambda: gradclip.clip_grad_norm_(parameters, max_norm),
        "operators": lambda: by_operators(lambda: gradclip.clip_grad_norm_(parameters, max_norm)),
        "hook": optimizer.step,
        "engine": lambda: serving.norm(tensors, 2.0),
    }
    with gradclip.GradientClipper(optimizer, max_norm):
        return interleaved_medians(rivals, gradients.rewrite, seconds)


def by_operators(call: Callable[[], object]) -> None:
    """Make a call while torch operators serve the CPU."""
    chosen, engines._BEST = engines._BEST, {}
    call()
    engines._BEST = chosen


def measure_orders(name: str, seconds: float) -> dict[str, float]:
    """Return the cost of clipping by other norms, under the threshold, as ratios to torch."""
    gradients = Gradients(SETS[name](), torch.float32)
    parameters = gradients.parameters
    ratios = {}
    for order in (1.0, math.inf):
        rivals = {
            module.__name__: lambda module=module, order=order: module.clip_grad_norm_(
                parameters, 1e9, order
            )
            for module in (torch.nn.utils, gradclip)
        }
        medians = interleaved_medians(rivals, gradients.rewrite, seconds)
        ratios[str(order)] = medians["gradclip"] / medians["torch.nn.utils"]
    return ratios


def measure_training(seconds: float) -> dict[str, float]:
    """Return the time of a whole training step of an LSTM in milliseconds.

    Here torch's threads work between two clippings, and the engine's threads between two backward
    passes.
    """
    model = nn.LSTM(128, 256, num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs = torch.randn(20, 16, 128)

    def train(clip: Callable[[Iterable[nn.Parameter], float], object]) -> None:
        optimizer.zero_grad()
        model(inputs)[0].square().mean().backward()
        clip(model.parameters(), 1e-3)
        optimizer.step()

    rivals = {
        "no clipping": lambda: train(lambda parameters, max_norm: None),
        "torch": lambda: train(torch.nn.utils.clip_grad_norm_),
        "gradclip": lambda: train(gradclip.clip_grad_norm_),
        "gradclip, torch operators": lambda: by_operators(lambda: train(gradclip.clip_grad_norm_)),
    }
    medians = interleaved_medians(rivals, lambda: None, seconds)
    return {name: taken * 1e3 for name, taken in medians.items()}


def measure_logging(seconds: float) -> dict[str, float]:
    """Return the time of a step of the small set with an idle optimizer in microseconds.

    A measurement is the mean of as many steps as a sink writes at once, writing included.
    """
    gradients = Gradients(SETS["small"](), torch.float32)
    parameters = gradients.parameters
    bare, hooked, logged = Still(parameters), Still(parameters), Still(parameters)
    steps = itertools.count()

    def by_hand() -> None:
        step = next(steps)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        writer.add_scalar("norm", norm.item(), step)
        writer.add_scalar("clipped", min(norm.item(), 1e9), step)
        bare.step()

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        rivals = {
            "torch": lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1e9), bare.step()),
            "torch and add_scalar": by_hand,
            "function": lambda: (gradclip.clip_grad_norm_(parameters, 1e9), bare.step()),
            "hook": hooked.step,
            "hook and log": logged.step,
        }
        with (
            gradclip.GradientClipper(hooked, 1e9),
            gradclip.GradientClipper(logged, 1e9, log=f"{folder}/gradclip"),
        ):
            medians = interleaved_medians(rivals, gradients.rewrite, seconds, calls=100)
    return {name: taken * 1e6 for name, taken in medians.items()}


def measure_hooks(name: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Return the costs of hooked steps, as ratios to torch's function, and the shares clipped."""
    gradients = Gradients(SETS[name](), torch.float32)
    parameters = gradients.parameters
    rivals: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9),
        "empty step": Still(parameters).step,
    }
    clippers = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def add(key: str, max_norm: Any, **options: Any) -> None:
            optimizer = Still(parameters)
            clipper = gradclip.GradientClipper(optimizer, max_norm, **options)
            clippers[key], rivals[key] = stack.enter_context(clipper), optimizer.step

        for regime, max_norm in REGIMES.items():
            add(f"hook, {regime}", max_norm)
            add(f"hook and log, {regime}", max_norm, log=f"{folder}/{regime}")
        for key, rule in RULES.items():
            add(key, rule())
        medians = interleaved_medians(rivals, gradients.rewrite, seconds)
        clipped = {key: clipper.clip_rate() for key, clipper in clippers.items()}
    return {
        key: (medians[key] / medians["torch"], clipped.get(key, 0.0))
        for key in rivals
        if key != "torch"
    }


@contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with another program."""
    programs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(torch.get_num_threads())
    ]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure_busy(seconds: float) -> dict[str, tuple[float, float]]:
    """Return the function's cost as ratios to torch, on a quiet machine and on a busy one."""
    ratios = {}
    for name, shapes in BUSY.items():
        gradients = Gradients(shapes, torch.float32)
        rivals = {
            module.__name__: partial(module.clip_grad_norm_, gradients.parameters, 1e9)
            for module in (torch.nn.utils, gradclip)
        }
        quiet = interleaved_medians(rivals, gradients.rewrite, seconds)
        with busy_cores():
            busy = interleaved_medians(rivals, gradients.rewrite, seconds)
        ratios[name] = (
            quiet["gradclip"] / quiet["torch.nn.utils"],
            busy["gradclip"] / busy["torch.nn.utils"],
        )
    return ratios


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the options ask for."""
    seconds, sets = options.seconds, options.sets
    bandwidth, reader = read_bandwidth(min(seconds, 2.0))
    return {
        "machine": machine(),
        "bandwidth": (bandwidth, reader),
        "hooks": {name: measure_hooks(name, seconds) for name in sets[:2]},
        "rows": [
            row
            for name in sets
            for dtype in options.dtypes
            for row in measure_set(name, dtype, seconds, bandwidth)
        ],
        "orders": measure_orders(sets[-1], seconds),
        "training_ms": measure_training(seconds),
        "logging_us": measure_logging(seconds),
        "busy": measure_busy(seconds),
    }


def measured_elsewhere(options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a new process: where its memory lies makes large gradients faster or slower."""
    lists = ["--sets", *options.sets, "--dtypes", *options.dtypes]
    seconds = ["--seconds", str(options.seconds)]
    command = [sys.executable, "-m", "benchmarks.cost.clip", *lists, *seconds, "--json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def median_of(found: list[Any]) -> Any:
    """Return structures of one form as one, with the median of each number."""
    first = found[0]
    if isinstance(first, dict):
        return {key: median_of([each[key] for each in found]) for key in first}
    if isinstance(first, list):
        return [median_of([*each]) for each in zip(*found, strict=True)]
    return statistics.median(found) if isinstance(first, float) else first


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--instructions", action="store_true", help="count them, with valgrind")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--runs", type=int, default=1, help="processes whose medians are shown")
    options = parser.parse_args(argv)
    if options.runs > 1:
        measured = median_of([measured_elsewhere(options) for _ in range(options.runs)])
    else:
        measured = measure(options)
    counted = instructions.count() if options.instructions and instructions.available() else {}
    if options.json:
        print(json.dumps({**measured, "instructions": counted}))
        return
    hooks, rows, training = measured["hooks"], measured["rows"], measured["training_ms"]
    orders, logging, busy = measured["orders"], measured["logging_us"], measured["busy"]
    bandwidth, reader = measured["bandwidth"]
    versions = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [
        "# Cost of clipping",
        "",
        f"Written by `make bench` on {date.today()}: {versions}.",
        f"Read bandwidth {bandwidth / 1e9:.1f} GB/s, by {reader}.",
        "Ratios to torch's default in the same run; lower is faster. "
        + f"Medians of {options.runs} runs, each in a process of its own." * (options.runs > 1),
        "",
        *table_of_hooks(hooks),
        "",
        *tables_of_sets(rows, logging),
        "",
        *(
            f"Clipping {options.sets[-1]} by its {order}-norm takes {ratio:.2f} of torch's time.\n"
            for order, ratio in orders.items()
        ),
        *table(
            ["training step of an LSTM", "ms", "of that without clipping"],
            [
                [name, f"{taken:.2f}", f"{taken / training['no clipping']:.3f}"]
                for name, taken in training.items()
            ],
        ),
        "",
        *table(
            ["function, under the threshold", "quiet machine", "both cores busy"],
            [[name, *(f"{ratio:.2f}" for ratio in pair)] for name, pair in busy.items()],
        ),
    ]
    if counted:
        lines += ["", *instructions.table_lines(counted)]
    elif options.instructions:
        lines += ["", f"Instructions were not counted: {instructions.MISSING}"]
    print("\n".join(lines))
    save(lines, options.save)


def table_of_hooks(hooks: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    """Return a Markdown table of hooked steps, two columns for each set."""
    header, rows = ["a whole step"], [[name] for name in next(iter(hooks.values()))]
    for name, measured in hooks.items():
        header += [name, "steps clipped"]
        for row in rows:
            ratio, clipped = measured[row[0]]
            row += [f"{ratio:.2f}", f"{clipped:.0%}"]
    return table(header, rows)


def tables_of_sets(rows: list[dict[str, Any]], logging: dict[str, float]) -> list[str]:
    """Return Markdown tables of every set and of the cost of logging."""
    names = ["set", "dtype", "regime", "torch, us", *RIVALS, "of bandwidth", "error"]
    return [
        *table(
            names,
            [
                [
                    *(row["set"], row["dtype"], row["regime"], f"{row['torch_us']:.0f}"),
                    *(f"{row[name]:.2f}" for name in RIVALS),
                    *(f"{row['read_share']:.0%}", f"{row['error']:.0e}"),
                ]
                for row in rows
            ],
        ),
        "",
        *table(
            ["small set, clipping and an empty step, under the threshold", "us", "ratio"],
            [
                [name, f"{taken:.0f}", f"{taken / logging['torch']:.2f}"]
                for name, taken in logging.items()
            ],
        ),
    ]


if __name__ == "__main__":
    main()
