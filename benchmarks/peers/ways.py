"""The ways to clip that are compared: those of other packages and of gradclip."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

import gradclip
from benchmarks.peers.packages import (
    FIXED,
    LIKE_PEERS,
    PEERS,
    RULES,
    Clipping,
    MakeFixed,
    parameters_of,
    torch_compiled,
)
from gradclip.thresholds import Threshold

Make = Callable[[list[Optimizer], GradScaler | None], Clipping]

MAX_NORM = 1.0
PACKAGES = {
    "Lightning Fabric": "lightning",
    "Accelerate": "accelerate",
    **{name: name.split()[0] for name in PEERS},
}
"""Distribution of each way."""


@dataclass(frozen=True)
class Way:
    """A way to clip.

    Args:
        name: Name in tables.
        kind: "fixed" clips to the norm `MAX_NORM`, "adaptive" to a norm learned from earlier ones,
            "unit" clips each unit by the norm of its weights.
        make: Returns the clipping for optimizers and the scaler of their gradients, if any.
    """

    name: str
    kind: str
    make: Make

    @property
    def installed(self) -> bool:
        """True if its package is installed."""
        try:
            return self.name not in PACKAGES or bool(version(PACKAGES[self.name]))
        except PackageNotFoundError:
            return False


def fixed_ways(backend: str) -> list[Way]:
    """Return the ways to clip to a fixed threshold.

    Args:
        backend: Backend of torch.compile.
    """
    makers: dict[str, MakeFixed] = {
        **FIXED,
        "torch compiled": functools.partial(torch_compiled, backend=backend),
    }
    return [
        *(Way(name, "fixed", _to_threshold(make)) for name, make in makers.items()),
        Way("gradclip function", "fixed", _function),
        Way("gradclip hook", "fixed", _hook(lambda: MAX_NORM, "global")),
    ]


def adaptive_ways() -> list[Way]:
    """Return the ways with rules, each of gradclip's after the similar ones."""
    ways = []
    for rule in dict.fromkeys(LIKE_PEERS.values()):
        scope, make = RULES[rule]
        kind = "unit" if scope == "unit" else "adaptive"
        for name in PEERS:
            if LIKE_PEERS[name] == rule:
                ways.append(Way(name, kind, _of_parameters(PEERS[name])))
        if scope == "unit":
            ways.append(
                Way(
                    "gradclip clip_grad_units_",
                    kind,
                    _of_parameters(
                        lambda parameters: Clipping(
                            lambda: gradclip.clip_grad_units_(parameters), lambda: None
                        )
                    ),
                )
            )
        ways.append(Way(f"gradclip {rule}", kind, _hook(make, scope)))
    return ways


def versions() -> dict[str, str]:
    """Return the version of each package, or "not installed"."""
    installed = {}
    for package in dict.fromkeys(PACKAGES.values()):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return {"gradclip": gradclip.__version__, **installed}


def _to_threshold(make: MakeFixed) -> Make:
    return lambda optimizers, scaler: make(optimizers, MAX_NORM, scaler)


def _of_parameters(make: Callable[[list[Any]], Clipping]) -> Make:
    return lambda optimizers, scaler: make(parameters_of(optimizers))


def _function(optimizers: list[Optimizer], scaler: GradScaler | None) -> Clipping:
    parameters = parameters_of(optimizers)
    return Clipping(lambda: gradclip.clip_grad_norm_(parameters, MAX_NORM))


def _hook(rule: Callable[[], float | Threshold], scope: str) -> Make:
    """Return a maker that attaches a clipper; a call of its clipping is an optimizer's step."""

    def make(optimizers: list[Optimizer], scaler: GradScaler | None) -> Clipping:
        joint = optimizers if len(optimizers) > 1 else optimizers[0]
        clipper = gradclip.GradientClipper(joint, rule(), scope=scope)

        def step_and_norm() -> object:
            optimizers[0].step()
            last: Any = clipper.last
            return last.norm if last.norm.dim() == 0 else None

        step = optimizers[0].step
        return Clipping(step, step_and_norm, clipper, lambda attached: attached, steps=True)

    return make
