"""Cost that logging adds to a step, beside logging by hand.

    python -m benchmarks.cost.logging [--seconds 20] [--shape small]

A clipper clips the gradients of all 161 parameters of ResNet-50 at every step of an optimizer that
does nothing: without a log, with the default log for TensorBoard, with the norms of the five
largest parameters, with those of all parameters, and with those of all parameters as JSON lines.
"By hand" is the code of many training loops: the result of ``torch.nn.utils.clip_grad_norm_`` is
passed to ``add_scalar``, with or without the norm of each parameter.

Sinks write 100 steps at once, so 100 steps are one measurement; their mean is shown. The time is
the CPU time of the training thread. The cost of logging does not depend on the size of the
gradients, which would hide it: by default each has 8 elements ("--shape full" takes the true
shapes).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks.common.gradients import Gradients, Still, machine
from benchmarks.common.shapes import resnet50
from benchmarks.common.timing import by_thread, interleaved_medians
from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from gradclip.report.printing import print_table

STEPS = 100
LIMITS = {"default": 40, "5 largest": 200, "all": 1000}
"""Largest cost of each log in microseconds a step."""


def rivals(shapes: list[tuple[int, ...]], folder: str) -> dict[str, Callable[[], object]]:
    """Return calls that take one step, by name."""
    logs = {
        "no log": None,
        "default": f"{folder}/default",
        "5 largest": TensorBoardSink(f"{folder}/largest", per_parameter=5),
        "all": TensorBoardSink(f"{folder}/all", per_parameter="all"),
        "all, JSON": JsonlSink(f"{folder}/all.jsonl", per_parameter="all"),
    }
    steps: dict[str, Callable[[], object]] = {}
    for name, log in logs.items():
        optimizer = Still(filled(shapes))
        GradientClipper(optimizer, 1e9, log=log)
        steps[name] = optimizer.step
    steps["by hand"] = by_hand(filled(shapes), f"{folder}/by_hand", each=False)
    steps["by hand, all"] = by_hand(filled(shapes), f"{folder}/by_hand_all", each=True)
    return steps


def filled(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Return parameters with gradients."""
    parameters = Gradients(shapes, torch.float32).parameters
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def by_hand(parameters: list[nn.Parameter], folder: str, *, each: bool) -> Callable[[], object]:
    """Return a call that clips with torch and logs with ``add_scalar``."""
    writer, steps = SummaryWriter(folder), iter(range(1 << 62))
    optimizer = Still(parameters)

    def step() -> None:
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        index = next(steps)
        writer.add_scalar("grad_norm", norm.item(), index)
        if each:
            for number, parameter in enumerate(parameters):
                writer.add_scalar(f"norm/{number}", parameter.grad.norm().item(), index)

    return step


def many(step: Callable[[], object]) -> Callable[[], object]:
    """Return a call that takes as many steps as a sink writes at once."""

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return steps


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--shape", choices=("small", "full"), default="small")
    options = parser.parse_args(argv)
    shapes = resnet50() if options.shape == "full" else [(8,) for _ in resnet50()]
    with tempfile.TemporaryDirectory() as folder:
        named = {name: many(step) for name, step in rivals(shapes, folder).items()}
        medians = interleaved_medians(named, lambda: None, options.seconds, timer=by_thread)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    rows = []
    for name, seconds in medians.items():
        added = (seconds - medians["no log"]) / STEPS * 1e6
        limit = f"{LIMITS[name]}" if name in LIMITS else ""
        rows.append((name, f"{seconds / STEPS * 1e6:.0f}", f"{added:.0f}", limit))
    header = ("log", "us a step", "added", "at most")
    print_table(header, rows, sys.stdout)


if __name__ == "__main__":
    main()
