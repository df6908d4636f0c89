from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import OptState

import gradclip
from gradclip import (
    AttachError,
    GradientClipper,
    NonFiniteGradientError,
    SkipLimitError,
    Threshold,
)

STEPS = 24
SPIKES = (0, 9, 10, 17)
"""Finite, far above the threshold; 0 is the step that makes the optimizer's state."""
SPIKE = 40.0
"""A threshold between the norms of spikes, 45 to 260, and of all others, up to 10."""
OVERFLOWS = (4, 5, 14)
MARKS = {"grad_scale", "found_inf"}

SETUPS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.02}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}


def takes_scales(name: str) -> bool:
    """Whether GradScaler leaves it to the fused optimizer to unscale; Adagrad since torch 2.7."""
    make, options = SETUPS[name]
    optimizer = make([nn.Parameter(torch.ones(1))], fused=True, **options)
    return getattr(optimizer, "_step_supports_amp_scaling", False)


FUSED = [f"fused {name}" for name in SETUPS if takes_scales(name)]
KINDS = [*SETUPS, *FUSED, "RMSprop"]
SOME = ["SGD", "Adam", "fused SGD", "fused Adam", FUSED[-1], "RMSprop"]

SKIP = {"exceed": "skip", "max_norm": SPIKE}
POLICIES = [
    {},
    {"nonfinite": "raise"},
    {"exceed": "skip", "nonfinite": "skip", "skip_limit": 3, "max_norm": SPIKE},
    {"exceed": "observe"},
    {"max_value": 0.3},
    {"exceed": "skip", "max_value": 0.5, "max_norm": 1.8},
    {"norm_type": math.inf},
]

fused_or_not = pytest.mark.parametrize("kind", ["Adam", "fused Adam", "SGD", "fused SGD"])
unscaled_or_not = pytest.mark.parametrize("unscale", [True, False], ids=["unscale_", "step"])


class PlannedError(Exception):
    """What a hook or a function raises here."""


class Rows(gradclip.Sink):
    def __init__(self, flush_every: int = 7) -> None:
        self.flush_every = flush_every
        self.steps: list[gradclip.LoggedStep] = []

    def write(self, steps):
        self.steps += steps


@dataclass
class Run:
    """What is left of a training."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    rows: list[tuple] = field(default_factory=list)
    steps: int = 0
    skipped: int = 0
    clip_rate: float = 0.0
    scales: list[float] = field(default_factory=list)
    caught: list[int] = field(default_factory=list)
    clipper: GradientClipper | None = None


@pytest.fixture(params=["host", "device"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of a step: with and, as on a CUDA device, without reading values."""
    if request.param == "device":
        take_the_device_route(monkeypatch)
    return request.param


def take_the_device_route(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("optimizers.joint", "gradients.step"):
        monkeypatch.setattr(f"gradclip.{module}.host_may_read", lambda _: False)


def scaler_of(growth_interval: int = 3) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=growth_interval)


def optimizer_of(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if kind == "RMSprop":
        return torch.optim.RMSprop(parameters, lr=0.02)
    make, options = SETUPS[kind.removeprefix("fused ")]
    return make(parameters, fused=kind.startswith("fused "), **options)


def fresh(kind: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (3,)]]
    return parameters, optimizer_of(kind, parameters)


def loss_of(step: int, parameters: list[nn.Parameter]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    inputs, targets = (torch.randn(8, width, generator=generator) for width in (5, 3))
    loss = ((inputs @ parameters[0] + parameters[1] - targets) ** 2).mean()
    return loss * (100.0 if step in SPIKES else (0.1, 0.4, 3.0)[step % 3])


def norm_of(parameters: list[nn.Parameter], order: float = 2.0) -> float:
    gradients = torch.cat([p.grad.double().flatten() for p in parameters])
    return torch.linalg.vector_norm(gradients, order).item()


@cache
def by_hand(
    kind: str,
    *,
    left_out: Collection[int] = (),
    poisoned: Collection[int] = (),
    max_norm: float = 1.0,
    exceed: str = "scale",
    nonfinite: str = "zero",
    max_value: float | None = None,
    norm_type: float = 2.0,
    skip_limit: int | None = None,
) -> Run:
    """Train with clipping written out, without gradclip and without a GradScaler."""
    parameters, optimizer = fresh(kind)
    run = Run(parameters, optimizer)
    reduced = finite = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(step, parameters).backward()
        if step in left_out:
            continue
        norm = norm_of(parameters, norm_type)
        if step in poisoned:
            norm = math.nan
        limited = [p.grad.clone() for p in parameters]
        if max_value is not None:
            limited = [g.clamp(-max_value, max_value) for g in limited]
        flat = torch.cat([g.double().flatten() for g in limited])
        bounded = torch.linalg.vector_norm(flat, norm_type).item()
        skip = exceed == "skip" and norm < math.inf and bounded > max_norm
        skip = skip or (exceed != "observe" and nonfinite in ("skip", "raise") and norm != norm)
        factor = min(1.0, max_norm / bounded)
        after = norm if skip else bounded * factor
        if step in poisoned and not skip:
            after = 0.0
        if exceed != "observe" and not skip:
            for parameter, gradient in zip(parameters, limited, strict=True):
                erased = step in poisoned
                parameter.grad = torch.zeros_like(gradient) if erased else gradient * factor
        if not skip:
            optimizer.step()
        reduced += after < norm  # never where the norm is NaN
        finite += norm < math.inf
        run.skipped += skip
        run.rows.append((run.steps, norm, after, norm != norm, skip, reduced / max(finite, 1)))
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
    hook_raises: Collection[int] = (),
    catch: type[Exception] = PlannedError,
    marks_stay: bool = False,
    each: Callable[[int, Run], None] | None = None,
    **options: Any,
) -> Run:
    """Train with a GradientClipper."""
    parameters, optimizer = fresh(kind)
    sink = Rows()
    now = 0
    clipper = GradientClipper(
        optimizer, max_norm(lambda: now) if callable(max_norm) else max_norm, log=sink, **options
    )
    run = Run(parameters, optimizer, clipper=clipper)

    def fail(*_: object) -> None:
        if now in hook_raises:
            raise PlannedError

    optimizer.register_step_pre_hook(fail)
    for now in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(now, parameters)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss * math.inf if now in overflows else loss).backward()
            run.scales.append(scaler.get_scale())
            if unscale:
                scaler.unscale_(optimizer)
        if now in poisoned:
            parameters[0].grad[0, 0] = math.nan
        try:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        except catch:
            run.caught.append(now)
        if not (marks_stay and now in run.caught):
            assert not MARKS & set(vars(optimizer)), now
        if scaler is not None:
            scaler.update()
        if each is not None:
            each(now, run)
    clipper.flush()
    run.rows = [
        (r.step, r.norm, r.clipped_norm, r.nonfinite, r.skipped, r.clip_rate) for r in sink.steps
    ]
    run.steps, run.skipped, run.clip_rate = clipper.steps, clipper.skipped, clipper.clip_rate()
    return run


def assert_same(found: Run, needed: Run) -> None:
    assert found.steps == needed.steps
    assert found.skipped == needed.skipped
    assert found.clip_rate == needed.clip_rate
    assert len(found.rows) == len(needed.rows)
    for one, other in zip(found.rows, needed.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-5, nan_ok=True)
    torch.testing.assert_close(found.parameters, needed.parameters, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found.optimizer.state_dict()["state"],
        needed.optimizer.state_dict()["state"],
        rtol=1e-5,
        atol=1e-6,
    )


def assert_scale_moved(run: Run) -> None:
    changes = {after / before for before, after in zip(run.scales, run.scales[1:], strict=False)}
    assert {0.5, 2.0} <= changes


# Whole trainings


@pytest.mark.parametrize("options", POLICIES, ids=str)
@unscaled_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_training_under_a_scaler_is_training_without_the_overflowed_steps(
    kind, unscale, options, route
):
    run = trained(kind, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS, **options)
    needed = by_hand(kind, left_out=OVERFLOWS, **options)
    assert_same(run, needed)
    assert_scale_moved(run)
    assert run.steps == STEPS - len(OVERFLOWS)
    assert not any(nonfinite for _, _, _, nonfinite, _, _ in run.rows)
    assert run.skipped > 0 or options.get("exceed") != "skip"
    assert 0 < run.clip_rate < 1 or SPIKE in options.values()


@unscaled_or_not
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fused SGD"])
def test_the_first_steps_may_overflow(kind, unscale, route):
    # Not fused SGD with momentum: torch's own first step then keeps uninitialised memory.
    overflows = (0, 1, 2, 11)
    run = trained(kind, scaler=scaler_of(), unscale=unscale, overflows=overflows, nonfinite="raise")
    assert_same(run, by_hand(kind, left_out=overflows))


@pytest.mark.parametrize("options", [{}, SKIP, POLICIES[-2]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_scaler_both_routes_train_alike(kind, options, route):
    assert_same(trained(kind, **options), by_hand(kind, **options))


@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "no scaler"])
@pytest.mark.parametrize(
    "options",
    [
        {"nonfinite": "skip"},
        {"nonfinite": "skip", "exceed": "skip", "max_norm": SPIKE},
        {"nonfinite": "skip", "max_value": 0.3},
        {"nonfinite": "zero", "exceed": "skip", "max_norm": SPIKE},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", SOME)
def test_gradients_that_become_nan_after_unscaling_meet_the_policy(kind, options, scaled, route):
    # A scaler has found no overflow in these: they are the clipper's.
    poisoned = (2, 7, 8, 12)
    scaling = {"scaler": scaler_of(), "unscale": True, "overflows": OVERFLOWS} if scaled else {}
    run = trained(kind, poisoned=poisoned, **scaling, **options)
    needed = by_hand(kind, left_out=OVERFLOWS if scaled else (), poisoned=poisoned, **options)
    assert_same(run, needed)
    assert sum(row[3] for row in run.rows) == len(poisoned)
    assert run.skipped > 0


@unscaled_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_record_holds_the_true_norm_after_every_step(kind, unscale, route):
    needed = iter(by_hand(kind, left_out=OVERFLOWS).rows)

    def compare(step: int, run: Run) -> None:
        if step not in OVERFLOWS:
            _, norm, after, *_ = next(needed)
            assert run.clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
            assert run.clipper.last.clipped_norm.item() == pytest.approx(after, rel=1e-5)

    trained(kind, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS, each=compare)
    assert next(needed, None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_disabled_scaler_changes_nothing(kind):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert_same(trained(kind, scaler=scaler), by_hand(kind))
    assert_same(trained(kind, scaler=scaler, unscale=True), by_hand(kind))


@fused_or_not
@unscaled_or_not
def test_groups_with_a_norm_of_their_own_are_unscaled_too(kind, unscale, route):
    parameters, _ = fresh(kind)
    optimizer = optimizer_of(
        kind, [{"params": [parameters[0]], "max_norm": 0.5}, {"params": [parameters[1]]}]
    )
    clipper = GradientClipper(optimizer, 0.25)
    norms = []
    scaler = scaler_of()
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(0, parameters) * (math.inf if step == 2 else 1)).backward()
        norms = [norm_of([p]) / scaler.get_scale() for p in parameters]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert clipper.labels == ("group 0", "global")
    assert clipper.last.norm.tolist() == pytest.approx(norms, rel=1e-6)
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 0.25], rel=1e-6)
    assert [norm_of([p]) for p in parameters] == pytest.approx([0.5, 0.25], rel=1e-6)
    assert clipper.steps == 3


@unscaled_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_clipped_once_by_their_true_norm(kind, unscale):
    def run(scaler: torch.amp.GradScaler | None) -> tuple[list[nn.Parameter], list[float]]:
        parameters, optimizer = fresh(kind)
        clipper = GradientClipper(optimizer, 1.0) if scaler else None
        norms = []
        for step in range(STEPS):
            loss = loss_of(step, parameters)
            (scaler.scale(loss) if scaler else loss).backward()
            if step % 3 < 2:
                continue
            if scaler:
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                norms.append(clipper.last.norm.item())
            else:
                norms.append(norm_of(parameters))
                for parameter in parameters:
                    parameter.grad *= min(1.0, 1 / norms[-1])
                optimizer.step()
            optimizer.zero_grad()
        return parameters, norms

    found, norms = run(scaler_of(growth_interval=2))
    needed, true_norms = run(None)
    assert norms == pytest.approx(true_norms, rel=1e-5)
    torch.testing.assert_close(found, needed, rtol=1e-5, atol=1e-6)


# What a threshold of one's own learns


class Learning(Threshold):
    """A fixed threshold that keeps what it may learn from."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.seen: list[tuple[int, float, float]] = []

    def thresholds(self, norms, context):
        return torch.full_like(norms, self.limit)

    def observe(self, norms, clipped_norms, context):
        if context.present:
            self.seen.append((context.step, norms.item(), clipped_norms.item()))


@pytest.mark.parametrize("options", [{}, SKIP, {"max_value": 0.3}], ids=str)
@unscaled_or_not
@fused_or_not
def test_a_threshold_learns_only_from_steps_that_were_taken(kind, unscale, options, route):
    rule = Learning(options.get("max_norm", 1.0))
    others = {name: value for name, value in options.items() if name != "max_norm"}
    trained(kind, rule, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS, **others)
    needed = by_hand(kind, left_out=OVERFLOWS, **options)
    assert needed.skipped == (len(SPIKES) if options == SKIP else 0)
    taken = [(step, norm, after) for step, norm, after, _, skip, _ in needed.rows if not skip]
    assert len(taken) == len(rule.seen)
    first = 1 if route == "device" else 0  # the device alone knows which steps were left out
    for seen, needed_step in zip(rule.seen, taken, strict=True):
        assert seen[first:] == pytest.approx(needed_step[first:], rel=1e-5)


# Steps that raise


class RaisingAt:
    """Makes a function for max_norm that raises at given iterations."""

    def __init__(self, *iterations: int) -> None:
        self.iterations = iterations

    def __call__(self, now: Callable[[], int]) -> Callable[[int], float]:
        def max_norm(step: int) -> float:
            if now() in self.iterations:
                raise PlannedError
            return 1.0

        return max_norm


@pytest.mark.parametrize("broken", [(3, 15), (8, 9, 10, 23)], ids=str)
@unscaled_or_not
@pytest.mark.parametrize("kind", SOME)
def test_an_error_of_the_clipper_leaves_no_marks_and_no_trace(kind, unscale, broken, route):
    # 3 and 15 stand beside an overflow.
    rule = RaisingAt(*broken)
    run = trained(kind, rule, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS)
    assert run.caught == list(broken)
    assert_same(run, by_hand(kind, left_out=frozenset({*OVERFLOWS, *broken})))


@unscaled_or_not
@fused_or_not
def test_too_many_skips_raise_at_once_and_leave_no_trace(kind, unscale):
    options = {"exceed": "skip", "skip_limit": 2, "max_norm": SPIKE}
    run = trained(
        kind,
        scaler=scaler_of(),
        unscale=unscale,
        overflows=OVERFLOWS,
        catch=SkipLimitError,
        **options,
    )
    assert run.caught == [10]
    assert_same(run, by_hand(kind, left_out=OVERFLOWS, **options))


@pytest.mark.parametrize("kind", ["SGD", "fused SGD"])
def test_skips_that_have_raised_do_not_raise_again(kind, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=2)
    reached = 0
    for step in (1, 0, 0, 1, 2):
        optimizer.zero_grad()
        loss_of(step, parameters).backward()
        try:
            optimizer.step()
        except SkipLimitError:
            reached += 1
    if route == "device":
        with pytest.raises(SkipLimitError):
            clipper.flush()
        reached += 1
    assert reached == 1
    clipper.flush()
    assert (clipper.steps, clipper.skipped) == (5, 2)


class Refusing(Threshold):
    """A threshold that fails to learn, once."""

    def __init__(self) -> None:
        self.count = 0

    def thresholds(self, norms, context):
        return torch.full_like(norms, 1.0)

    def observe(self, norms, clipped_norms, context):
        self.count += 1
        if self.count == 3:
            raise PlannedError


@unscaled_or_not
@fused_or_not
def test_an_error_after_the_step_leaves_no_marks_and_no_trace(kind, unscale, route):
    run = trained(kind, Refusing(), scaler=scaler_of(), unscale=unscale)
    assert run.caught == [2]
    needed = by_hand(kind)  # the step itself was taken
    torch.testing.assert_close(run.parameters, needed.parameters, rtol=1e-5, atol=1e-6)
    norms = [row[1] for row in needed.rows]
    assert [row[1] for row in run.rows[-20:]] == pytest.approx(norms[-20:], rel=1e-5)


@unscaled_or_not
@fused_or_not
def test_a_skip_limit_of_a_batch_leaves_no_marks_and_no_trace(kind, unscale, monkeypatch):
    take_the_device_route(monkeypatch)
    options = {"exceed": "skip", "skip_limit": 2, "max_norm": SPIKE}
    run = trained(
        kind,
        scaler=scaler_of(),
        unscale=unscale,
        overflows=OVERFLOWS,
        catch=SkipLimitError,
        **options,
    )
    # Where the second batch of 7 is full; only a fused one has records of overflows.
    assert run.caught == [13 if kind.startswith("fused") else 16]
    assert_same(run, by_hand(kind, left_out=OVERFLOWS, **options))


@unscaled_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_does_not_interrupt_skips_in_a_row(kind, unscale, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=2)
    scaler = scaler_of()
    reached = []
    for step, factor in enumerate((1e-3, 1, math.inf, 1)):
        optimizer.zero_grad()
        scaler.scale(loss_of(0, parameters) * factor).backward()
        if unscale:
            scaler.unscale_(optimizer)
        try:
            scaler.step(optimizer)
        except SkipLimitError:
            reached.append(step)
        scaler.update()
    assert reached == ([3] if route == "host" else [])
    if route == "device":
        with pytest.raises(SkipLimitError, match="2 steps in a row were skipped"):
            clipper.flush()
    assert (clipper.steps, clipper.skipped) == (3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_raise_leaves_no_marks_and_counts_as_skipped(kind, route):
    options = {"nonfinite": "raise", "poisoned": (7, 16)}
    run = trained(
        kind,
        scaler=scaler_of(),
        unscale=True,
        overflows=OVERFLOWS,
        catch=NonFiniteGradientError,
        **options,
    )
    assert run.caught == [7, 16]
    assert_same(run, by_hand(kind, left_out=OVERFLOWS, **options))
    assert run.skipped == 2


@pytest.mark.parametrize("broken", [(3, 6, 7, 16), (2, 3, 5, 9, 10, 13)], ids=str)
@pytest.mark.parametrize("options", [{}, SKIP], ids=str)
@unscaled_or_not
@pytest.mark.parametrize("kind", SOME)
def test_after_a_hook_that_raised_training_goes_on_as_without_that_step(
    kind, unscale, options, broken, route
):
    # 3 and 13 are followed by overflows, 5 is one itself, 9 and 10 are skipped by the policy.
    run = trained(
        kind,
        scaler=scaler_of(),
        unscale=unscale,
        overflows=OVERFLOWS,
        hook_raises=broken,
        marks_stay=True,
        **options,
    )
    fused = kind.startswith("fused ")
    assert run.caught == [step for step in broken if fused or step not in OVERFLOWS]
    assert_same(run, by_hand(kind, left_out=frozenset({*OVERFLOWS, *broken}), **options))


@unscaled_or_not
@pytest.mark.parametrize("kind", FUSED)
def test_after_a_hook_that_raised_a_step_without_the_scaler_is_right(kind, unscale, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, 1.0)
    failing = optimizer.register_step_pre_hook(raise_planned)
    scaler = scaler_of()
    scaler.scale(loss_of(0, parameters)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(PlannedError):
        scaler.step(optimizer)
    failing.remove()
    optimizer.zero_grad()
    loss_of(0, parameters).backward()
    norm = norm_of(parameters)
    optimizer.step()
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 1
    assert not MARKS & set(vars(optimizer))
    twins, twin = fresh(kind)
    for parameter, clipped in zip(twins, parameters, strict=True):
        parameter.grad = clipped.grad.clone()
    twin.step()
    torch.testing.assert_close(parameters, twins, rtol=1e-6, atol=1e-7)


def raise_planned(*_: object) -> None:
    raise PlannedError


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_a_hook_that_raised_without_a_scaler_leaves_nothing_of_ours(kind, exceed, route):
    parameters, optimizer = fresh(kind)
    GradientClipper(optimizer, SPIKE, exceed=exceed)
    loss_of(2, parameters).backward()
    optimizer.step()
    failing = optimizer.register_step_pre_hook(raise_planned)
    loss_of(0, parameters).backward()
    gradients = [p.grad for p in parameters]
    values = [g.clone() for g in gradients]
    try:
        optimizer.step()
    except PlannedError:
        failing.remove()
    assert not MARKS & set(vars(optimizer))
    assert [p.grad for p in parameters] == gradients
    if exceed == "skip":
        torch.testing.assert_close(gradients, values, rtol=0, atol=0)


# What a skip leaves behind


@pytest.mark.parametrize("scaled", [True, False], ids=["scaler", "no scaler"])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skip_leaves_everything_bit_for_bit(kind, steps_before, scaled, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
    for step in [*range(1, 1 + steps_before), 0]:
        before = [p.detach().clone() for p in parameters]
        state = _copied(optimizer.state_dict())
        optimizer.zero_grad()
        scaler.scale(loss_of(step, parameters)).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad for p in parameters]
        values = [g.clone() for g in gradients]
        scaler.step(optimizer)
        scaler.update()
    assert clipper.skipped == 1
    assert clipper.steps == steps_before + 1
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    torch.testing.assert_close(gradients, values, rtol=0, atol=0)
    torch.testing.assert_close(parameters, before, rtol=0, atol=0, check_dtype=False)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("policy", [{"exceed": "skip"}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_marks_that_a_user_set_are_the_same_objects_after_a_skip(kind, policy, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, **policy)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
    marks = optimizer.found_inf, optimizer.grad_scale
    for step in (1, 0, 2):
        optimizer.zero_grad()
        (loss_of(step, parameters) * 4).backward()
        if step == 0 and "nonfinite" in policy:
            parameters[1].grad[0] = math.inf
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        assert (optimizer.found_inf, optimizer.grad_scale) == marks
        assert optimizer.found_inf is marks[0]
        assert optimizer.grad_scale is marks[1]
        assert [m.item() for m in marks] == [0.0, 4.0]
        assert (step == 0) == all(map(torch.equal, parameters, before))
    assert (clipper.steps, clipper.skipped) == (3, 1)


@pytest.mark.parametrize("kind", FUSED)
def test_a_found_inf_that_a_user_set_is_a_step_left_out(kind, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise")
    loss_of(1, parameters).backward()
    optimizer.step()
    before = [p.detach().clone() for p in parameters]
    parameters[0].grad.fill_(math.inf)
    optimizer.found_inf = mine = torch.tensor(1.0)
    optimizer.step()
    assert optimizer.found_inf is mine
    assert all(map(torch.equal, parameters, before))
    assert (clipper.steps, clipper.skipped, clipper.clip_rate()) == (1, 0, 0.0)


@pytest.mark.parametrize("under_a_scaler", [True, False])
@pytest.mark.parametrize("kind", FUSED)
def test_a_grad_scale_that_a_user_set_counts_into_the_norm(kind, under_a_scaler, route):
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, 1.0)
    loss_of(0, parameters).backward()
    norm = norm_of(parameters)
    optimizer.zero_grad()
    optimizer.grad_scale = torch.tensor(4.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=under_a_scaler)
    scaler.scale(loss_of(0, parameters) * 4).backward()
    scaler.step(optimizer)
    assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-6)
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-6)


# What only the device knows


@pytest.mark.parametrize("asks_first", [True, False])
@pytest.mark.parametrize("kind", FUSED)
def test_on_the_device_route_the_skip_limit_raises_at_flush(kind, asks_first, monkeypatch):
    take_the_device_route(monkeypatch)
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=3)
    for step in (1, 0, 0, 0, 0, 1):
        optimizer.zero_grad()
        loss_of(step, parameters).backward()
        optimizer.step()
    if asks_first:
        assert clipper.skipped == 4
    with pytest.raises(SkipLimitError, match="3 steps in a row were skipped"):
        clipper.flush()
    assert (clipper.steps, clipper.skipped) == (6, 4)
    clipper.flush()


@pytest.mark.parametrize("kind", FUSED)
def test_on_the_device_route_fewer_skips_than_the_limit_raise_nothing(kind, monkeypatch):
    take_the_device_route(monkeypatch)
    parameters, optimizer = fresh(kind)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=3)
    for step in (1, 0, 0, 1, 0, 0):
        optimizer.zero_grad()
        loss_of(step, parameters).backward()
        optimizer.step()
        clipper.flush()
    assert clipper.skipped == 4


@pytest.mark.parametrize("kind", FUSED)
def test_on_the_device_route_the_skip_limit_raises_when_a_batch_is_there(kind, monkeypatch):
    take_the_device_route(monkeypatch)
    parameters, optimizer = fresh(kind)
    sink = Rows(flush_every=4)
    clipper = GradientClipper(optimizer, SPIKE, exceed="skip", skip_limit=2, log=sink)
    reached = []
    for step in (1, 0, 0, 0, 1):
        optimizer.zero_grad()
        loss_of(step, parameters).backward()
        try:
            optimizer.step()
        except SkipLimitError:
            reached.append(len(sink.steps))
        assert not MARKS & set(vars(optimizer))
        assert all(p.grad is not None for p in parameters)
    assert reached == [4]
    clipper.flush()
    assert [row.skipped for row in sink.steps] == [False, True, True, True, False]


@unscaled_or_not
@pytest.mark.parametrize("kind", SOME)
def test_the_state_right_after_overflows_is_that_of_the_steps_taken(kind, unscale, route):
    rows = by_hand(kind, left_out=OVERFLOWS, **SKIP).rows
    states = []

    def compare(step: int, run: Run) -> None:
        count = step + 1 - sum(overflow <= step for overflow in OVERFLOWS)
        state = run.clipper.state_dict()
        assert state["steps"] == count
        assert state["counters"]["skipped_steps"] == sum(row[4] for row in rows[:count])
        assert state["counters"]["finite"] == count
        assert state["counters"]["nonfinite_steps"] == 0
        states.append(state)

    scaling = {"scaler": scaler_of(), "unscale": unscale, "overflows": OVERFLOWS}
    run = trained(kind, each=compare, **scaling, **SKIP)
    assert len(states) == STEPS
    _, other = fresh(kind)
    resumed = GradientClipper(other, SPIKE, exceed="skip")
    resumed.load_state_dict(states[14])  # right after an overflow
    assert resumed.steps == 12
    assert resumed.state_dict() == states[14]
    run.clipper.load_state_dict(states[14])
    assert run.clipper.state_dict() == states[14]


@pytest.mark.parametrize("kind", FUSED)
def test_steps_can_be_set_after_overflows_that_only_the_device_knows(kind, route):
    def set_steps(step: int, run: Run) -> None:
        if step == 5:
            run.clipper.steps = 100
            assert run.clipper.steps == 100

    run = trained(kind, scaler=scaler_of(), overflows=OVERFLOWS, each=set_steps)
    assert [row[0] for row in run.rows] == [0, 1, 2, 3, *range(100, 117)]
    assert run.steps == 117


# The old contract


class OldContract(torch.optim.SGD):
    """An optimizer that is handed the scaler and unscales by itself, in its step."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self._step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        overflowed = False
        if grad_scaler is not None:
            state = grad_scaler._per_optimizer_states[id(self)]
            if state["stage"] is OptState.READY:
                grad_scaler.unscale_(self)
            overflowed = any(found.item() for found in state["found_inf_per_device"].values())
        if not overflowed:
            super().step()


old_contract = pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")


@old_contract
def test_an_optimizer_that_unscales_in_its_step_is_refused():
    parameters, _ = fresh("SGD")
    optimizer = OldContract(parameters)
    clipper = GradientClipper(optimizer, 1.0)
    scaler = scaler_of()
    scaler.scale(loss_of(0, parameters)).backward()
    before = [p.detach().clone() for p in parameters]
    gradients = [p.grad.clone() for p in parameters]
    with pytest.raises(AttachError, match="OldContract .*call grad_scaler.unscale_"):
        scaler.step(optimizer)
    assert all(map(torch.equal, parameters, before))
    assert all(map(torch.equal, [p.grad for p in parameters], gradients))
    assert clipper.steps == 0
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert clipper.steps == 1
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-6)
    for parameter, earlier in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.data, earlier - 0.1 * parameter.grad)


def test_an_optimizer_that_unscales_in_its_step_serves_without_a_scaler():
    parameters, _ = fresh("SGD")
    optimizer = OldContract(parameters)
    clipper = GradientClipper(optimizer, 1.0)
    loss_of(0, parameters).backward()
    optimizer.step()
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-6)
    optimizer.zero_grad()
    loss_of(0, parameters).backward()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert norm_of(parameters) == pytest.approx(1.0, rel=1e-6)
    assert clipper.steps == 2


@old_contract
def test_an_overflow_under_the_old_contract_is_the_scalers_own():
    parameters, _ = fresh("SGD")
    optimizer = OldContract(parameters)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise")
    scaler = scaler_of()
    scaler.scale(loss_of(0, parameters) * math.inf).backward()
    before = [p.detach().clone() for p in parameters]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(map(torch.equal, parameters, before))
    assert clipper.steps == 0
