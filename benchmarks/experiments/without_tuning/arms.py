"""The ways to clip that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from torch import nn
from torch.optim import Optimizer

import gradclip
from benchmarks.experiments.without_tuning.task import Task
from benchmarks.peers.packages import PEERS
from gradclip import GradientClipper, MemorySink
from gradclip.report.advice import Advice, advised
from gradclip.report.run import run_of
from gradclip.report.summary import summarized
from gradclip.thresholds import (
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    Quantile,
    RelativeToWeights,
    ZScore,
)

NONE: Final = "none"
AUTO: Final = "auto"
GRID = tuple(float(f"{10 ** (exponent / 2):.3g}") for exponent in range(-3, 6))
"""Fixed thresholds over four decades."""
OBSERVED: dict[str, Literal["auto"] | None] = {"advised": None, "advised after auto": AUTO}
"""Arms that take the advice of `gradclip report` on one run, and the ``max_norm`` of that run."""
RULES: dict[str, Callable[[], dict[str, Any]]] = {
    AUTO: lambda: {"max_norm": AUTO},
    "Percentile(10)": lambda: {"max_norm": Percentile(10)},
    "Quantile(50)": lambda: {"max_norm": Quantile(50)},
    "ZScore(2.5)": lambda: {"max_norm": ZScore(2.5)},
    "MedianDeviation(10)": lambda: {"max_norm": MedianDeviation(10)},
    "MeanDeviation(6), skip": lambda: {
        "max_norm": MeanDeviation(6),
        "exceed": "skip",
        "nonfinite": "skip",
    },
    "MovingAverage(1.05), parameter": lambda: {
        "max_norm": MovingAverage(1.05),
        "scope": "parameter",
    },
    "GrowthLimit(1.01), parameter": lambda: {"max_norm": GrowthLimit(1.01), "scope": "parameter"},
    "RelativeToWeights(0.01), unit": lambda: {
        "max_norm": RelativeToWeights(0.01),
        "scope": "unit",
    },
}
"""Rules of gradclip as they were published; each call makes a new one."""
PACKAGES = tuple(name for name in PEERS if not name.startswith("timm"))
"""Other packages' rules; timm's is that of `RelativeToWeights`."""
ARMS = (NONE, *(f"{threshold:g}" for threshold in GRID), *RULES, *PACKAGES, *OBSERVED)


@dataclass
class Clipping:
    """A way to clip that is ready to be used."""

    before_step: Callable[[], object] = lambda: None
    """Called between backward and step."""
    clipper: GradientClipper | None = None

    def clip_rate(self) -> float:
        """Return the share of clipped steps; NaN where nobody counts."""
        return float("nan") if self.clipper is None else self.clipper.clip_rate()


def clipping(arm: str, model: nn.Module, optimizer: Optimizer, advice: Advice | None) -> Clipping:
    """Attach a way to clip to an optimizer.

    Args:
        arm: One of `ARMS`.
        model: The model.
        optimizer: Its optimizer.
        advice: The advice that an arm of `OBSERVED` takes; None for others.
    """
    if arm == NONE:
        return Clipping()
    if arm in PACKAGES:
        return Clipping(before_step=PEERS[arm]([*model.parameters()]))
    if advice is not None:
        return Clipping(clipper=attached_by(advice, optimizer, model))
    options = RULES[arm]() if arm in RULES else {"max_norm": float(arm)}
    return Clipping(clipper=GradientClipper(optimizer, **options))


def attached_by(advice: Advice, optimizer: Optimizer, model: nn.Module) -> GradientClipper:
    """Return the clipper of an advice, made by its own line of code."""
    names = {"gradclip": gradclip, "optimizer": optimizer, "model": model}
    line = advice.line  # of this package, and a call of the clipper
    return eval(line, {**vars(gradclip), **names})  # type: ignore[no-any-return]  # noqa: S307


def advice_of(task: Task, sink: MemorySink) -> Advice:
    """Return what `gradclip report` advises after a run."""
    run = run_of(sink.steps, task.name)
    return advised(run, summarized(run))
