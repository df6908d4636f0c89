"""A training of one optimizer under a GradScaler, with a clipper, and one clipped by hand."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradclip import GradientClipper, MemorySink, Threshold
from tests.support.reference import INF
from tests.support.twins import (
    PlannedError,
    assert_tensors_close,
    clip_by_hand,
    has_marks,
    joint_scaler,
    layers,
    layers_loss,
    parameters_of,
    values_of,
)

STEPS = 24
SPIKES = (0, 9, 10, 17)
"""Finite, far above the threshold; 0 is the step that makes the optimizer's state."""
SPIKE = 40.0
"""A threshold between the norms of spikes and of all others."""
OVERFLOWS = (4, 5, 14)

SETUPS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.02}),
}


def scaled_optimizer(kind: str, parameters: list[Any] | None = None) -> Optimizer:
    make, options = SETUPS[kind.removeprefix("fused ")]
    form = {"fused": True} if kind.startswith("fused ") else {}
    return make(layers(3) if parameters is None else parameters, **options, **form)


def unscales_by_itself(kind: str) -> bool:
    """Fused Adagrad does so since torch 2.7."""
    return getattr(scaled_optimizer(kind), "_step_supports_amp_scaling", False)


FUSED = [f"fused {name}" for name in [*SETUPS][:4] if unscales_by_itself(f"fused {name}")]
KINDS = [*SETUPS, *FUSED]
SOME = ["SGD", "Adam", "fused SGD", "fused Adam", FUSED[-1], "RMSprop"]
SKIP = {"exceed": "skip", "max_norm": SPIKE}

all_kinds = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", SOME)
fused_kinds = pytest.mark.parametrize("kind", FUSED)
fused_or_not = pytest.mark.parametrize("kind", ["Adam", "fused Adam", "SGD", "fused SGD"])
unscaled_or_not = pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step"])


def scaled_loss(step: int, optimizer: Optimizer) -> Tensor:
    factor = 70.0 if step in SPIKES else (0.1, 0.4, 5.0)[step % 3]
    return layers_loss(step, parameters_of(optimizer), factor)


class Learning(Threshold):
    """A fixed threshold that keeps all that it may learn from; it fails once where it is to."""

    def __init__(self, limit: float = 1.0, fails_at: int = -1) -> None:
        self.limit = limit
        self.fails_at = fails_at
        self.learned: list[tuple[int, float, float]] = []

    def thresholds(self, norms, context):
        return torch.full_like(norms, self.limit)

    def observe(self, norms, clipped_norms, context):
        if context.present:
            self.learned.append((context.step, norms.item(), clipped_norms.item()))
            if len(self.learned) == self.fails_at:
                raise PlannedError


@dataclass
class Run:
    """A training with a clipper, and what it has left."""

    optimizer: Optimizer
    clipper: GradientClipper
    rows: list[tuple] = field(default_factory=list)
    """Step, norm, clipped norm, not finite, skipped, clip rate."""
    last: list[tuple[float, float]] = field(default_factory=list)
    """The norms of `GradientClipper.last` after each step that the scaler has not skipped."""
    scales: list[float] = field(default_factory=list)
    caught: list[int] = field(default_factory=list)


@cache
def scaled_by_hand(
    kind: str,
    *,
    left_out: Collection[int] = OVERFLOWS,
    poisoned: Collection[int] = (),
    max_norm: float = 1.0,
    exceed: str = "scale",
    nonfinite: str = "zero",
    max_value: float = INF,
    norm_type: float = 2.0,
    skip_limit: int | None = None,
) -> tuple[Optimizer, list[tuple]]:
    """Train with clipping by hand and without a GradScaler; return the optimizer and rows."""
    optimizer, rows = scaled_optimizer(kind), []
    reduced = finite = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        scaled_loss(step, optimizer).backward()
        if step in left_out:
            continue
        bad, gradients = step in poisoned, [p.grad for p in parameters_of(optimizer)]
        norm = clip_by_hand(optimizer, threshold=INF, bound=max_value, order=norm_type)
        bounded = clip_by_hand(optimizer, threshold=max_norm, order=norm_type)
        skip = nonfinite in ("skip", "raise") if bad else exceed == "skip" and bounded > max_norm
        norm = math.nan if bad else norm
        after = norm if skip else 0.0 if bad else min(bounded, max_norm)
        for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
            if exceed == "observe":
                parameter.grad = gradient
            elif bad:
                parameter.grad.zero_()
        if not skip:
            optimizer.step()
        reduced += after < norm  # never where the norm is NaN
        finite += not bad
        rows.append((len(rows), norm, after, bad, skip, reduced / max(finite, 1)))
    return optimizer, rows


def trained(
    kind: str,
    max_norm: Any = 1.0,
    *,
    scale: bool | None = True,
    unscale: bool = False,
    overflows: Collection[int] = OVERFLOWS,
    poisoned: Collection[int] = (),
    broken: Collection[int] = (),
    raising: str = "",
    catch: type[Exception] = PlannedError,
    each: Callable[[int, Run], None] = lambda step, run: None,
    **options: Any,
) -> Run:
    """Train with a clipper; at broken steps a later hook raises, or the function max_norm.

    Args:
        scale: True for a GradScaler, False for one that is disabled, None for none.
    """
    sink, scaler, now = MemorySink(flush_every=7), joint_scaler(enabled=bool(scale)), 0

    def fail(*_: object) -> float:
        if now in broken:
            raise PlannedError
        return 1.0

    optimizer = scaled_optimizer(kind)
    max_norm = fail if raising == "max_norm" else max_norm
    run = Run(optimizer, GradientClipper(optimizer, max_norm, log=sink, **options))
    if raising == "a hook":
        optimizer.register_step_pre_hook(lambda *_: fail() and None)
    for now in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(scaled_loss(now, optimizer) * (INF if now in overflows else 1)).backward()
        run.scales.append(scaler.get_scale())
        if unscale:
            scaler.unscale_(optimizer)
        if now in poisoned:
            parameters_of(optimizer)[0].grad[0, 0] = math.nan
        try:
            optimizer.step() if scale is None else scaler.step(optimizer)
        except catch:
            run.caught.append(now)
        # A hook of others that raises leaves GradScaler's own marks, as without a clipper.
        assert not has_marks(optimizer) or (raising == "a hook" and now in run.caught)
        if scale is not None:
            scaler.update()
        if now not in (*overflows, *broken):
            last = run.clipper.last
            run.last.append((last.norm.item(), last.clipped_norm.item()))
        each(now, run)
    run.clipper.flush()
    run.rows = [
        (r.step, r.norm, r.clipped_norm, r.nonfinite, r.skipped, r.clip_rate) for r in sink.steps
    ]
    return run


def trained_as_by_hand(
    kind: str,
    *,
    scale: bool | None = True,
    overflows: Collection[int] | None = None,
    poisoned: Collection[int] = (),
    broken: Collection[int] = (),
    **options: Any,
) -> Run:
    """Train with a clipper and by hand, and compare."""
    if overflows is None:
        overflows = OVERFLOWS if scale else ()
    steps = {"overflows": overflows, "poisoned": poisoned, "broken": broken}
    run = trained(kind, scale=scale, **steps, **options)
    for name in ("unscale", "raising", "catch"):
        options.pop(name, None)
    left_out = frozenset({*overflows, *broken})
    optimizer, rows = scaled_by_hand(kind, left_out=left_out, poisoned=poisoned, **options)
    clipper = run.clipper
    assert (clipper.steps, clipper.skipped) == (len(rows), sum(row[4] for row in rows))
    assert clipper.clip_rate() == rows[-1][5]
    for one, other, last in zip(run.rows, rows, run.last, strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
        assert last == pytest.approx(other[1:3], rel=1e-5, nan_ok=True)
    states = [each.state_dict()["state"] for each in (run.optimizer, optimizer)]
    assert_tensors_close([values_of(run.optimizer), states[0]], [values_of(optimizer), states[1]])
    return run
