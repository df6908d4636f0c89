"""A training of one optimizer under a GradScaler, with a clipper, and one clipped by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradclip
from gradclip import GradientClipper
from tests.support.reference import clipped, gradient_norm, norm_of
from tests.support.twins import has_marks

STEPS = 24
SPIKES = (0, 9, 10, 17)
"""Finite, far above the threshold; 0 is the step that makes the optimizer's state."""
SPIKE = 40.0
"""A threshold between the norms of spikes, 45 to 260, and of all others, up to 10."""
OVERFLOWS = (4, 5, 14)

SETUPS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


def scaled_optimizer(kind: str, parameters: list[Any]) -> Optimizer:
    if kind == "RMSprop":
        return torch.optim.RMSprop(parameters, lr=0.02)
    make, options = SETUPS[kind.removeprefix("fused ")]
    return make(parameters, fused=kind.startswith("fused "), **options)


def unscales_by_itself(kind: str) -> bool:
    """Fused Adagrad does so since torch 2.7."""
    optimizer = scaled_optimizer(kind, [nn.Parameter(torch.ones(1))])
    return getattr(optimizer, "_step_supports_amp_scaling", False)


FUSED = [f"fused {name}" for name in SETUPS if unscales_by_itself(f"fused {name}")]
KINDS = [*SETUPS, *FUSED, "RMSprop"]
SOME = ["SGD", "Adam", "fused SGD", "fused Adam", FUSED[-1], "RMSprop"]
SKIP = {"exceed": "skip", "max_norm": SPIKE}

all_kinds = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", SOME)
fused_kinds = pytest.mark.parametrize("kind", FUSED)
fused_or_not = pytest.mark.parametrize("kind", ["Adam", "fused Adam", "SGD", "fused SGD"])
unscaled_or_not = pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step"])


class PlannedError(Exception):
    """An error that a hook or a function raises here."""


class Rows(gradclip.Sink):
    def __init__(self, flush_every: int = 7) -> None:
        self.flush_every = flush_every
        self.steps: list[gradclip.LoggedStep] = []

    def write(self, steps):
        self.steps += steps


def scaler_of(growth_interval: int = 3, *, enabled: bool = True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(
        "cpu", init_scale=2.0**10, growth_interval=growth_interval, enabled=enabled
    )


def fresh(kind: str) -> tuple[list[nn.Parameter], Optimizer]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (3,)]]
    return parameters, scaled_optimizer(kind, parameters)


def scaled_loss(step: int, parameters: list[nn.Parameter]) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    inputs, targets = (torch.randn(8, width, generator=generator) for width in (5, 3))
    loss = ((inputs @ parameters[0] + parameters[1] - targets) ** 2).mean()
    return loss * (100.0 if step in SPIKES else (0.1, 0.4, 3.0)[step % 3])


def values_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@dataclass
class Run:
    """A training, and what it has left."""

    parameters: list[nn.Parameter]
    optimizer: Optimizer
    rows: list[tuple] = field(default_factory=list)
    """Step, norm, clipped norm, not finite, skipped, clip rate."""
    steps: int = 0
    skipped: int = 0
    clip_rate: float = 0.0
    last: list[tuple[float, float]] = field(default_factory=list)
    """The norms of `GradientClipper.last` after each step that the scaler has not skipped."""
    scales: list[float] = field(default_factory=list)
    caught: list[int] = field(default_factory=list)
    clipper: GradientClipper | None = None


@cache
def scaled_by_hand(
    kind: str,
    *,
    left_out: Collection[int] = (),
    poisoned: Collection[int] = (),
    max_norm: float = 1.0,
    exceed: str = "scale",
    nonfinite: str = "zero",
    max_value: float = math.inf,
    norm_type: float = 2.0,
    skip_limit: int | None = None,
) -> Run:
    """Train with clipping written out, without gradclip and without a GradScaler."""
    run = Run(*fresh(kind))
    reduced = finite = 0
    for step in range(STEPS):
        run.optimizer.zero_grad()
        scaled_loss(step, run.parameters).backward()
        if step in left_out:
            continue
        bad = step in poisoned
        norm = math.nan if bad else gradient_norm(run.parameters, norm_type)
        limited = [p.grad.clamp(-max_value, max_value) for p in run.parameters]
        bounded = norm_of(limited, norm_type)
        skip = exceed == "skip" and not bad and bounded > max_norm
        skip = skip or (exceed != "observe" and nonfinite in ("skip", "raise") and bad)
        after = norm if skip else 0.0 if bad else min(bounded, max_norm)
        if exceed != "observe" and not skip:
            for parameter, gradient in zip(
                run.parameters, clipped(limited, max_norm, norm_type), strict=True
            ):
                parameter.grad = gradient.float() * (not bad)
        if not skip:
            run.optimizer.step()
        reduced += after < norm  # never where the norm is NaN
        finite += not bad
        run.skipped += skip
        run.rows.append((run.steps, norm, after, bad, skip, reduced / max(finite, 1)))
        run.steps += 1
    run.clip_rate = reduced / finite
    return run


def trained(
    kind: str,
    max_norm: Any = 1.0,
    *,
    scaler: torch.amp.GradScaler | None = None,
    unscale: bool = False,
    overflows: Collection[int] = (),
    poisoned: Collection[int] = (),
    broken: Collection[int] = (),
    raising: str = "",
    catch: type[Exception] = PlannedError,
    each: Callable[[int, Run], None] | None = None,
    **options: Any,
) -> Run:
    """Train with a clipper; at broken steps a later hook raises, or the function max_norm."""
    run, sink, now = Run(*fresh(kind)), Rows(), 0

    def fail(*_: object) -> float:
        if now in broken:
            raise PlannedError
        return 1.0

    if raising == "max_norm":
        max_norm = fail
    run.clipper = clipper = GradientClipper(run.optimizer, max_norm, log=sink, **options)
    if raising == "a hook":
        run.optimizer.register_step_pre_hook(lambda *_: fail() and None)
    for now in range(STEPS):
        run.optimizer.zero_grad()
        loss = scaled_loss(now, run.parameters)
        (
            loss if scaler is None else scaler.scale(loss * (math.inf if now in overflows else 1))
        ).backward()
        if scaler is not None:
            run.scales.append(scaler.get_scale())
        if unscale:
            scaler.unscale_(run.optimizer)
        if now in poisoned:
            run.parameters[0].grad[0, 0] = math.nan
        try:
            run.optimizer.step() if scaler is None else scaler.step(run.optimizer)
        except catch:
            run.caught.append(now)
        # A hook of others that raises leaves GradScaler's own marks, as without a clipper.
        assert not has_marks(run.optimizer) or (raising == "a hook" and now in run.caught)
        if scaler is not None:
            scaler.update()
        if now not in (*overflows, *broken):
            run.last.append((clipper.last.norm.item(), clipper.last.clipped_norm.item()))
        if each is not None:
            each(now, run)
    clipper.flush()
    run.rows = [
        (r.step, r.norm, r.clipped_norm, r.nonfinite, r.skipped, r.clip_rate) for r in sink.steps
    ]
    run.steps, run.skipped, run.clip_rate = clipper.steps, clipper.skipped, clipper.clip_rate()
    return run


def assert_same(found: Run, needed: Run) -> None:
    assert (found.steps, found.skipped) == (needed.steps, needed.skipped)
    assert found.clip_rate == needed.clip_rate
    for one, other, last in zip(found.rows, needed.rows, found.last, strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
        assert last == pytest.approx(other[1:3], rel=1e-5, nan_ok=True)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found.parameters, needed.parameters, **close)
    states = [run.optimizer.state_dict()["state"] for run in (found, needed)]
    torch.testing.assert_close(*states, **close)
