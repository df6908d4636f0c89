"""Ways to clip that are compared with each other: other packages' and gradclip's."""

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
"""The distribution that a way comes from."""


@dataclass(frozen=True)
class Way:
    """A way to clip.

    Args:
        name: What it is called in tables.
        kind: "fixed": to the norm `MAX_NORM`; "adaptive": to a norm that it takes from those
            before; "unit": each unit by the norm of its weights.
        make: Sets it up for optimizers and for the scaler of their gradients, if there is one.
    """

    name: str
    kind: str
    make: Make

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        try:
            return self.name not in PACKAGES or bool(version(PACKAGES[self.name]))
        except PackageNotFoundError:
            return False


def fixed_ways(backend: str) -> list[Way]:
    """Return the ways to clip to a fixed threshold.

    Args:
        backend: What torch.compile is to use.
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
    """Return the ways with rules, each of gradclip's behind those that it is like."""
    found = []
    for scope, rule in dict.fromkeys(LIKE_PEERS.values()):
        kind = "unit" if scope == "unit" else "adaptive"
        for name in PEERS:
            if LIKE_PEERS[name] == (scope, rule):
                found.append(Way(name, kind, _of_parameters(PEERS[name])))
        if scope == "unit":
            found.append(
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
        found.append(Way(f"gradclip {rule.__name__}", kind, _hook(rule, scope)))
    return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed, or that they are not."""
    found = {}
    for package in dict.fromkeys(PACKAGES.values()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"gradclip": gradclip.__version__, **found}


def _to_threshold(make: MakeFixed) -> Make:
    return lambda optimizers, scaler: make(optimizers, MAX_NORM, scaler)


def _of_parameters(make: Callable[[list[Any]], Clipping]) -> Make:
    return lambda optimizers, scaler: make(parameters_of(optimizers))


def _function(optimizers: list[Optimizer], scaler: GradScaler | None) -> Clipping:
    parameters = parameters_of(optimizers)
    return Clipping(lambda: gradclip.clip_grad_norm_(parameters, MAX_NORM))


def _hook(rule: Callable[[], float | Threshold], scope: str) -> Make:
    """Return what attaches a clipper; where it is called by hand, it is in an optimizer's step."""

    def make(optimizers: list[Optimizer], scaler: GradScaler | None) -> Clipping:
        joint = optimizers if len(optimizers) > 1 else optimizers[0]
        clipper = gradclip.GradientClipper(joint, rule(), scope=scope)

        def told() -> object:
            optimizers[0].step()
            last: Any = clipper.last
            return last.norm if last.norm.dim() == 0 else None

        return Clipping(optimizers[0].step, told, clipper, lambda optimizers: optimizers)

    return make
