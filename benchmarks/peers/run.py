"""The same tasks by gradclip and by other packages, interleaved in one process.

    python -m benchmarks.peers.run [--seconds 10] [--sets small lstm] [--backend inductor]
        [--save benchmarks/results/peers.md]

Measures the cost of a step, the error of the norm against float64, and the results in hazards (see
`hazards.py`). A package that is not installed is shown as such. Calls are interleaved, each on
newly rewritten gradients. Each is a whole step of an optimizer that does nothing: a hooked step,
record included, or the call of a function and a step without hooks. Times are ratios to such a step
with torch's `clip_grad_norm_`. One thread computes, and the time is its CPU time: on a busy machine
the wall time would count the work of others.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.gradients import Gradients, Still, machine
from benchmarks.common.markdown import save, table
from benchmarks.common.shapes import SETS
from benchmarks.common.timing import by_thread, deadline, interleaved_medians
from benchmarks.peers.hazards import HAZARDS, outcome, raised
from benchmarks.peers.packages import Clipping
from benchmarks.peers.scenes import STEPS, USUAL
from benchmarks.peers.ways import Way, adaptive_ways, fixed_ways, versions

REFERENCE = "torch"
REGIMES: dict[str, tuple[float, ...]] = {"under": (0.5,), "clipping": (5.0,)}
"""Norms of the gradients, whose threshold is 1."""
VARIED = tuple(USUAL[0] + (USUAL[1] - USUAL[0]) * (index * 24 % 61) / 61 for index in range(61))
"""Norms for rules, never the same twice in a row."""
LEARNED: dict[str, Callable[[], Iterator[float]]] = {
    "varied": lambda: itertools.cycle(VARIED),
    "falling": lambda: (USUAL[0] * 0.99999**step for step in itertools.count()),
}
"""Norms for rules by regime. Each that falls is below all that a rule has seen."""
HALF_OF_UNITS = 5e-4
"""Size of the elements for which AGC clips about half of the units of `Gradients`."""
COMPILE_SECONDS = 240.0
HARD: dict[str, tuple[Sequence[tuple[int, ...]], torch.dtype, float | None]] = {
    "1e7 elements of 0.1": ([(2500, 4000)], torch.float32, 0.1),
    "1e4 elements of 1e20": ([(100, 100)], torch.float32, 1e20),
    "1e4 elements of 1e38": ([(100, 100)], torch.float32, 1e38),
    "1e4 elements of 1e-25": ([(100, 100)], torch.float32, 1e-25),
    "float16, 1e4 elements of 3e4": ([(100, 100)], torch.float16, 3e4),
    "lstm in bfloat16": (SETS["lstm"](), torch.bfloat16, None),
}
"""Shapes, dtype, and the value of all elements; None draws them from a normal distribution."""

Medians = dict[str, float]
Cells = dict[str, str]


class Prepared:
    """Ways to clip the same gradients, and the reason for each that cannot.

    Args:
        ways: The ways.
        gradients: The gradients to clip.
        prepare: Writes gradients for the first call of each way.
    """

    def __init__(
        self, ways: Sequence[Way], gradients: Gradients, prepare: Callable[[], None]
    ) -> None:
        self.clippings: dict[str, Clipping] = {}
        self.missing: Cells = {}
        self._bare = Still(gradients.parameters)
        for way in ways:
            if not way.installed:
                self.missing[way.name] = "not installed"
                continue
            try:
                prepare()
                clipping = way.make([Still(gradients.parameters)], None)
                with deadline(COMPILE_SECONDS):
                    clipping()
                self.clippings[way.name] = clipping
            except Exception as error:  # noqa: BLE001  # the others can be measured
                self.missing[way.name] = raised(error)

    def medians(self, prepare: Callable[[], None], seconds: float) -> Medians:
        """Return the median time of a step with each way in seconds."""
        steps = {name: each.with_step_of(self._bare) for name, each in self.clippings.items()}
        return interleaved_medians(steps, prepare, seconds, timer=by_thread)

    def errors(self, prepare: Callable[[], None], norm: Callable[[], float]) -> Cells:
        """Return the error of the norm that each way reports."""
        errors = dict(self.missing)
        for name, clipping in self.clippings.items():
            prepare()
            true = norm()
            try:
                norm_found = clipping.norm()
                errors[name] = "none" if norm_found is None else error_of(norm_found, true)
            except Exception as error:  # noqa: BLE001  # the error is the result
                errors[name] = raised(error)
        return errors


def error_of(norm: float, true: float) -> str:
    """Return the relative error of a norm, or the norm itself if it is 0 or not finite."""
    if not math.isfinite(norm) or norm == 0:
        return f"norm {norm:g}"
    return f"{abs(norm / true - 1):.0e}"


def scaled(gradients: Gradients, norms: Iterator[float]) -> Callable[[], None]:
    """Return a call that rewrites gradients with one norm after the other."""
    gradients.rewrite()
    usual = gradients.norm()

    def prepare() -> None:
        gradients.rewrite()
        tensors: list[Any] = [parameter.grad for parameter in gradients.parameters]
        torch._foreach_mul_(tensors, next(norms) / usual)

    return prepare


def warm_up(prepared: Prepared, gradients: Gradients) -> None:
    """Take `STEPS` steps with all rules; only the smallest parameter has a gradient, for speed."""
    tensors = [parameter.grad for parameter in gradients.parameters]
    smallest = min(gradients.parameters, key=lambda parameter: parameter.numel())
    for parameter in gradients.parameters:
        parameter.grad = None
    smallest.grad = torch.empty_like(smallest)
    for norm in itertools.islice(itertools.cycle(VARIED), STEPS):
        for clipping in prepared.clippings.values():
            smallest.grad.fill_(norm / smallest.numel() ** 0.5)
            clipping()
    for parameter, gradient in zip(gradients.parameters, tensors, strict=True):
        parameter.grad = gradient


def measure_set(
    name: str, fixed: Sequence[Way], adaptive: Sequence[Way], seconds: float
) -> dict[str, Any]:
    """Return the cost of a step and the error of the norm on one set of gradients.

    Returns:
        Medians of the regimes and of the two kinds of rules, errors, and reasons for missing ways.
    """
    gradients = Gradients(SETS[name](), torch.float32)
    prepared = Prepared(fixed, gradients, gradients.rewrite)
    rows: dict[str, Any] = {"missing": dict(prepared.missing)}
    for regime, norms in REGIMES.items():
        rows[regime] = prepared.medians(scaled(gradients, itertools.cycle(norms)), seconds)
    rows["errors"] = prepared.errors(gradients.rewrite, gradients.norm)
    reference = [way for way in fixed if way.name == REFERENCE]
    size = gradients.bytes // torch.float32.itemsize
    of_units = {"unit": lambda: itertools.repeat(HALF_OF_UNITS * size**0.5)}
    for kind, regimes in {"adaptive": LEARNED, "unit": of_units}.items():
        ways = [way for way in adaptive if way.kind == kind]
        first, *_ = regimes.values()
        rivals = Prepared([*reference, *ways], gradients, scaled(gradients, first()))
        if kind == "adaptive":
            warm_up(rivals, gradients)
        for regime, norms in regimes.items():
            rows[regime] = rivals.medians(scaled(gradients, norms()), seconds)
        rows["missing"].update(rivals.missing)
        rows["errors"].update(rivals.errors(gradients.rewrite, gradients.norm))
    return rows


def hard_errors(ways: Sequence[Way], case: str) -> Cells:
    """Return the errors of the norm in a hard case."""
    shapes, dtype, element = HARD[case]
    gradients = Gradients(list(shapes), dtype)

    def prepare() -> None:
        gradients.rewrite()
        if element is not None:
            for parameter in gradients.parameters:
                parameter.grad = torch.full_like(parameter, element)

    return Prepared(ways, gradients, prepare).errors(prepare, gradients.norm)


def cost_table(
    measured: dict[str, dict[str, Any]], ways: Sequence[Way], regimes: Sequence[str]
) -> list[str]:
    """Return ratios to torch as a Markdown table."""
    names = [way.name for way in ways if way.name != REFERENCE]
    rows = []
    for name, results in measured.items():
        for regime in regimes:
            reference = results[regime][REFERENCE]
            cells = [
                f"{results[regime][way] / reference:.2f}"
                if way in results[regime]
                else results["missing"][way]
                for way in names
            ]
            rows.append([name, regime, f"{reference * 1e6:.0f}", *cells])
    return table(["set", "regime", "torch, us", *names], rows)


def hazard_table(ways: Sequence[Way], hazards: Sequence[str]) -> list[str]:
    """Return the results of ways to clip in hazards as a Markdown table."""
    rows = [
        [hazard, HAZARDS[hazard][1], *(outcome(way, hazard) for way in ways)] for hazard in hazards
    ]
    return table(["hazard", "right result", *(way.name for way in ways)], rows)


def error_table(errors: dict[str, Cells], ways: Sequence[Way]) -> list[str]:
    """Return the errors of norms as a Markdown table."""
    names = [way.name for way in ways]
    return table(
        ["gradients", *names], [[case, *(e[n] for n in names)] for case, e in errors.items()]
    )


def report(options: argparse.Namespace) -> list[str]:
    """Measure everything and return the lines of the Markdown report."""
    fixed, adaptive = fixed_ways(options.backend), adaptive_ways()
    rules = [way for way in adaptive if way.kind == "adaptive"]
    units = [way for way in adaptive if way.kind == "unit"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = {
            name: measure_set(name, fixed, adaptive, options.seconds) for name in options.sets
        }
        errors = {name: measured[name]["errors"] for name in options.sets}
        for case in options.hard:
            errors[case] = hard_errors([*fixed, *adaptive], case)
    environment = {
        **machine(),
        "cores": os.cpu_count(),
        **versions(),
        "backend of torch.compile": options.backend,
        "date": datetime.date.today().isoformat(),
    }
    return [
        "# gradclip beside other ways to clip",
        "",
        "Written by `python -m benchmarks.peers.run`, whose docstring describes the method.",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "## Cost of a step",
        "",
        "CPU time of a whole step, as ratios to one with torch's `clip_grad_norm_`.",
        "With a given threshold, below it and above it:",
        "",
        *cost_table(measured, fixed, list(REGIMES)),
        "",
        "With a threshold learned from earlier norms; gradclip's rules follow similar packages. Of",
        "norms that vary, and slowly fall, some rules clip most and others none:",
        "",
        *cost_table(measured, rules, ["varied", "falling"]),
        "",
        "Unit by unit, with about half of the units clipped:",
        "",
        *cost_table(measured, units, ["unit"]),
        "",
        "## Error of the norm",
        "",
        "Relative error of the returned or recorded norm, against float64:",
        "",
        *error_table(errors, fixed),
        "",
        *error_table(errors, adaptive),
        "",
        "## Hazards",
        "",
        f"After {STEPS} usual steps. Norms are those of the clipped gradient. Packages that attach",
        "to an optimizer are attached (autoclip, smartclip, gradclip); other functions are called",
        "right before the step, or in the closure after its backward pass.",
        "",
        *hazard_table(fixed, options.hazards),
        "",
        *hazard_table(adaptive, options.hazards),
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--hard", nargs="*", choices=HARD, default=list(HARD))
    parser.add_argument("--hazards", nargs="*", choices=HAZARDS, default=list(HAZARDS))
    parser.add_argument("--seconds", type=float, default=10.0, help="per row of a table of costs")
    parser.add_argument("--backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--save", type=Path, help="also write the Markdown to this file")
    options = parser.parse_args(argv)
    threads, level = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    try:
        lines = report(options)
    finally:
        torch.set_num_threads(threads)
        logging.disable(level)
        torch.compiler.reset()
    print("\n".join(lines))
    save(lines, options.save)


if __name__ == "__main__":
    main()
