"""Cost of every rule and of every scope, beside other packages.

    python -m benchmarks.cost.thresholds [--seconds 5] [--steps 100 10000 1000000]

Four tables. The first is the cost that a rule adds to a step with k norms, after a history of
different lengths. Only the length of a history could make a rule slower, so the history is made
with k = 1, and for a larger k each norm gets a copy of its state. The second is the same cost in
whole steps of a small model with k = 1, weight norms included. The third compares scopes on the
same gradients. The fourth compares other packages on the same gradients, if they are installed (see
`benchmarks/peers/packages.py`). Ratios are ratios of medians of interleaved calls.
"""

from __future__ import annotations

import argparse
import itertools
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradclip
from benchmarks.common.gradients import Gradients, Still, machine
from benchmarks.common.shapes import SETS
from benchmarks.common.timing import interleaved_medians
from benchmarks.peers.packages import Halving, print_peers
from gradclip.gradients.coefficients import clip_coefficient, clip_coefficients
from gradclip.thresholds import (
    Auto,
    Fixed,
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    Quantile,
    RelativeToWeights,
    Schedule,
    StepContext,
    Threshold,
    ZScore,
)

CPU = torch.device("cpu")
RULES: dict[str, Callable[[], Threshold]] = {
    "Fixed": lambda: Fixed(1.0),
    "Schedule": lambda: Schedule(lambda step: 1.0 + 1.0 / (step + 1)),
    "RelativeToWeights": RelativeToWeights,
    "GrowthLimit": GrowthLimit,
    "MovingAverage": MovingAverage,
    "Quantile": Quantile,
    "Auto": Auto,
    "ZScore": ZScore,
    "MeanDeviation": MeanDeviation,
    "MedianDeviation": MedianDeviation,
    "Percentile": Percentile,
    "Percentile, window 100": lambda: Percentile(window=100),
}


class History:
    """A rule that gets norms as from a clipper.

    Args:
        rule: The rule.
        count: Number of norms a step.
    """

    def __init__(self, rule: Threshold, count: int) -> None:
        self.rule = rule
        rule.start([f"norm {index}" for index in range(count)], CPU, torch.float64)
        generator = torch.Generator().manual_seed(0)
        norms = [
            1 + torch.rand(count, dtype=torch.float64, generator=generator) for _ in range(512)
        ]
        # One norm is a number, as from a clipper.
        self._norms = itertools.cycle([n.item() for n in norms] if count == 1 else norms)
        self._weights = torch.ones(count, dtype=torch.float64)
        self._present = torch.ones(count, dtype=torch.bool)
        self.steps = 0

    def step(self) -> None:
        """Take one step: thresholds, coefficients, observation."""
        norms, context = self._next()
        thresholds = self.rule.thresholds(norms, context)
        self.rule.observe(norms, norms * self._coefficients_of(norms, thresholds), context)

    def bare_step(self) -> None:
        """Take one step without a rule."""
        norms, _ = self._next()
        _ = norms * self._coefficients_of(norms, 1.0 if isinstance(norms, float) else self._weights)

    def grown_to(self, steps: int) -> History:
        """Take steps until there were this many; return the history itself."""
        while self.steps < steps:
            self.step()
        return self

    def repeated(self, count: int, make: Callable[[], Threshold]) -> History:
        """Return a history of ``count`` norms, each with the state of this history's norm."""
        wide = History(make(), count)
        state = self.rule.state_dict()
        wide.rule.load_state_dict({name: _repeated(each, count) for name, each in state.items()})
        wide.steps = self.steps
        return wide

    def _next(self) -> tuple[Any, StepContext]:
        self.steps += 1
        return next(self._norms), StepContext(self.steps, self._present, 2.0, self._weights)

    def _coefficients_of(self, norms: Any, thresholds: Any) -> Any:
        if isinstance(norms, float):
            return clip_coefficient(norms, thresholds, erase=True)
        return clip_coefficients(norms, thresholds, erase=True)


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, dict):
        return {name: _repeated(each, count) for name, each in value.items()}
    return torch.cat([value] * count) if isinstance(value, Tensor) else value


def measure_rules(
    counts: list[int], steps: list[int], seconds: float
) -> dict[tuple[str, int], list[float]]:
    """Return the microseconds that each rule adds to a step, by rule and number of norms."""
    added: dict[tuple[str, int], list[float]] = {}
    for name, make in RULES.items():
        history = History(make(), 1).grown_to(steps[0])
        before = resident_megabytes()
        histories = {n: history.grown_to(n).rule.state_dict() for n in steps}
        grown = resident_megabytes() - before
        print(f"{name}: {grown:.1f} MB more after {steps[-1]:,} steps than after {steps[0]:,}")
        for count in counts:
            rivals: dict[str, Callable[[], object]] = {}
            for n, state in histories.items():
                grown = History(make(), 1)
                grown.rule.load_state_dict(state)
                grown.steps = n
                rivals[str(n)] = grown.repeated(count, make).step
            rivals["bare"] = History(Fixed(1.0), count).bare_step
            medians = interleaved_medians(rivals, lambda: None, seconds, calls=10)
            added[name, count] = [(medians[str(n)] - medians["bare"]) * 1e6 for n in steps]
    return added


def resident_megabytes() -> float:
    """Return the resident memory of the process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure_steps(seconds: float) -> dict[str, float]:
    """Return the seconds of a whole step of the small set by rule, after 300 steps."""
    gradients = Gradients(SETS["small"](), torch.float32)
    rivals: dict[str, Callable[[], object]] = {}
    for name, make in RULES.items():
        optimizer = Still(gradients.parameters)
        gradclip.GradientClipper(optimizer, make())
        rivals[name] = optimizer.step
    for _ in range(300):
        gradients.rewrite()
        for step in rivals.values():
            step()
    return interleaved_medians(rivals, gradients.rewrite, seconds)


def measure_scopes(name: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """Return the seconds of a step by scope, with no norm or half of the norms clipped."""
    gradients = Gradients(SETS[name](), dtype)
    rivals: dict[str, Callable[[], object]] = {}
    clippers = []
    for scope in ("global", "parameter", "unit"):
        for regime, rule in (("under", 1e9), ("clipping", Halving())):
            optimizer = Still(gradients.parameters)
            clippers.append(gradclip.GradientClipper(optimizer, rule, scope=scope))
            rivals[f"{scope}, {regime}"] = optimizer.step
    return interleaved_medians(rivals, gradients.rewrite, seconds)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 10_000, 1_000_000])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 150, 10_000])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["small", "resnet50"])
    options = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    try:
        print(", ".join(f"{key} {value}" for key, value in machine().items()))
        print_rules(options.counts, options.steps, options.seconds)
        print_steps(options.seconds)
        for name in options.sets:
            print_scopes(name, options.seconds)
            print_peers(name, options.seconds)
    finally:
        torch.set_grad_enabled(True)


def print_rules(counts: list[int], steps: list[int], seconds: float) -> None:
    """Print the cost of each rule, and the memory that it gains with its history."""
    print()
    rows = measure_rules(counts, steps, seconds)
    columns = " | ".join(f"after {n:,} steps" for n in steps)
    print(f"\n| rule, added us a step | k | {columns} |\n|---|---|{'---|' * len(steps)}")
    for (name, count), added in rows.items():
        print(f"| {name} | {count:,} | {' | '.join(f'{each:.0f}' for each in added)} |")


def print_steps(seconds: float) -> None:
    """Print the cost of each rule in whole steps, beside torch's clipping and one addition."""
    medians = measure_steps(seconds)
    parameters = Gradients(SETS["small"](), torch.float32).parameters
    one = torch.ones(1)
    rivals = {
        "torch": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e9),
        "addition": lambda: one + one,
    }
    references = interleaved_medians(rivals, lambda: None, seconds, calls=10)
    print(
        f"\ntorch's clip_grad_norm_ takes {references['torch'] * 1e6:.0f} us on the small set, the "
        f"addition of two numbers {references['addition'] * 1e6:.1f} us\n"
    )
    print("| small, whole steps | added to Fixed, us | of torch's clip |\n|---|---|---|")
    for name, median in medians.items():
        added = median - medians["Fixed"]
        print(f"| {name} | {added * 1e6:.0f} | {added / references['torch']:.2f} |")


def print_scopes(name: str, seconds: float) -> None:
    """Print the cost of each scope as a ratio to the global scope."""
    print(f"\n| {name}, scope | dtype | under | half of the norms above |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        medians = measure_scopes(name, dtype, seconds)
        for scope in ("global", "parameter", "unit"):
            ratios = [
                medians[f"{scope}, {regime}"] / medians[f"global, {regime}"]
                for regime in ("under", "clipping")
            ]
            short = str(dtype).removeprefix("torch.")
            print(f"| {scope} | {short} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
