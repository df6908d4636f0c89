"""Whole trainings under a GradScaler, on both routes, are as those clipped by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from gradclip import GradientClipper, NonFiniteGradientError, SkipLimitError, Threshold
from tests.support.reference import gradient_norm
from tests.support.scaled_training import (
    KINDS,
    OVERFLOWS,
    SKIP,
    SPIKE,
    SPIKES,
    STEPS,
    PlannedError,
    all_kinds,
    assert_same,
    fresh,
    fused_or_not,
    scaled_by_hand,
    scaled_loss,
    scaled_optimizer,
    scaler_of,
    some_kinds,
    trained,
    unscaled_or_not,
)

# Whole trainings


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "raise"},
        {"exceed": "skip", "nonfinite": "skip", "skip_limit": 3, "max_norm": SPIKE},
        {"exceed": "observe"},
        {"max_value": 0.3},
        {"exceed": "skip", "max_value": 0.5, "max_norm": 1.8},
        {"norm_type": math.inf},
    ],
    ids=str,
)
@unscaled_or_not
@all_kinds
def test_overflowed_steps_are_as_if_they_had_not_been(kind, unscale, options, route):
    run = trained(kind, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS, **options)
    assert_same(run, scaled_by_hand(kind, left_out=OVERFLOWS, **options))
    assert {0.5, 2.0} <= {after / before for before, after in pairwise(run.scales)}
    assert not any(nonfinite for _, _, _, nonfinite, _, _ in run.rows)
    assert run.skipped > 0 or options.get("exceed") != "skip"
    assert 0 < run.clip_rate < 1 or SPIKE in options.values()


@unscaled_or_not
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fused SGD"])
def test_the_first_steps_may_overflow(kind, unscale, route):
    """Not of fused SGD with momentum: torch's own first step then keeps uninitialised memory."""
    overflows = (0, 1, 2, 11)
    run = trained(kind, scaler=scaler_of(), unscale=unscale, overflows=overflows, nonfinite="raise")
    assert_same(run, scaled_by_hand(kind, left_out=overflows))


@pytest.mark.parametrize("scaled", [True, False], ids=["disabled scaler", "no scaler"])
@pytest.mark.parametrize(
    "options", [{}, SKIP, {"exceed": "skip", "max_value": 0.5, "max_norm": 1.8}], ids=str
)
@all_kinds
def test_without_a_scale(kind, options, scaled, route):
    scaling = {"scaler": scaler_of(enabled=False), "unscale": True} if scaled else {}
    assert_same(trained(kind, **scaling, **options), scaled_by_hand(kind, **options))


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
@some_kinds
def test_gradients_that_become_nan_after_unscaling(kind, options, scaled, route):
    """A scaler has found no overflow in these: they meet the clipper's policy."""
    poisoned = (2, 7, 8, 12)
    scaling = {"scaler": scaler_of(), "unscale": True, "overflows": OVERFLOWS} if scaled else {}
    run = trained(kind, poisoned=poisoned, **scaling, **options)
    left_out = OVERFLOWS if scaled else ()
    assert_same(run, scaled_by_hand(kind, left_out=left_out, poisoned=poisoned, **options))
    assert sum(row[3] for row in run.rows) == len(poisoned)
    assert run.skipped > 0


@fused_or_not
@unscaled_or_not
def test_groups_with_a_norm_of_their_own(kind, unscale, route):
    parameters, _ = fresh(kind)
    optimizer = scaled_optimizer(
        kind, [{"params": [parameters[0]], "max_norm": 0.5}, {"params": [parameters[1]]}]
    )
    clipper, scaler, norms = GradientClipper(optimizer, 0.25), scaler_of(), []
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(scaled_loss(0, parameters) * (math.inf if step == 2 else 1)).backward()
        norms = [gradient_norm([p]) / scaler.get_scale() for p in parameters]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert clipper.labels == ("group 0", "global")
    assert clipper.last.norm.tolist() == pytest.approx(norms, rel=1e-6)
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 0.25], rel=1e-6)
    assert [gradient_norm([p]) for p in parameters] == pytest.approx([0.5, 0.25], rel=1e-6)
    assert clipper.steps == 3


@unscaled_or_not
@all_kinds
def test_accumulated_gradients_are_clipped_once(kind, unscale):
    (ours, optimizer), (theirs, other) = fresh(kind), fresh(kind)
    clipper, scaler = GradientClipper(optimizer, 1.0), scaler_of(growth_interval=2)
    for step in range(STEPS):
        scaler.scale(scaled_loss(step, ours)).backward()
        scaled_loss(step, theirs).backward()
        if step % 3 < 2:
            continue
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        norm = gradient_norm(theirs)
        assert clipper.last.norm.item() == pytest.approx(norm, rel=1e-5)
        for parameter in theirs:
            parameter.grad *= min(1.0, 1 / norm)
        other.step()
        optimizer.zero_grad()
        other.zero_grad()
    assert clipper.steps == STEPS // 3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("options", [{}, SKIP, {"max_value": 0.3}], ids=str)
@unscaled_or_not
@fused_or_not
def test_a_rule_learns_only_from_steps_that_were_taken(kind, unscale, options, route):
    rule = Learning(options.get("max_norm", 1.0))
    others = {name: value for name, value in options.items() if name != "max_norm"}
    trained(kind, rule, scaler=scaler_of(), unscale=unscale, overflows=OVERFLOWS, **others)
    needed = scaled_by_hand(kind, left_out=OVERFLOWS, **options)
    assert needed.skipped == (len(SPIKES) if options == SKIP else 0)
    taken = [row[:3] for row in needed.rows if not row[4]]
    first = 1 if route == "device" else 0  # the device alone knows which steps were skipped
    for learned, row in zip(rule.learned, taken, strict=True):
        assert learned[first:] == pytest.approx(row[first:], rel=1e-5)


# Steps that raise


BROKEN = [
    # 3, 13 and 15 stand beside overflows, 5 is one itself; 9 and 10 are skipped by the policy
    ("max_norm", {}, (3, 8, 9, 10, 15, 23)),
    ("a hook", {}, (2, 3, 5, 9, 10, 13)),
    ("a hook", SKIP, (2, 3, 5, 9, 10, 13)),
    ("a hook", SKIP, (3, 6, 7, 16)),
]


@pytest.mark.parametrize(("raising", "options", "broken"), BROKEN, ids=str)
@unscaled_or_not
@some_kinds
def test_steps_that_raised(kind, unscale, raising, options, broken, route):
    """The rest is as if they had not been."""
    scaling = {"scaler": scaler_of(), "unscale": unscale, "overflows": OVERFLOWS}
    run = trained(kind, **scaling, broken=broken, raising=raising, **options)
    # GradScaler itself calls the step of an overflow only if the optimizer heeds its marks.
    calls = kind.startswith("fused")
    assert run.caught == [step for step in broken if calls or step not in OVERFLOWS]
    assert_same(run, scaled_by_hand(kind, left_out=frozenset({*OVERFLOWS, *broken}), **options))


@all_kinds
def test_an_error_for_a_nonfinite_norm_counts_as_skipped(kind, route):
    options = {"nonfinite": "raise", "poisoned": (7, 16)}
    scaling = {"scaler": scaler_of(), "unscale": True, "overflows": OVERFLOWS}
    run = trained(kind, **scaling, catch=NonFiniteGradientError, **options)
    assert run.caught == [7, 16]
    assert_same(run, scaled_by_hand(kind, left_out=OVERFLOWS, **options))
    assert run.skipped == 2


@unscaled_or_not
@fused_or_not
def test_too_many_skips_raise_and_leave_no_trace(kind, unscale, route):
    """At once where the host knows them, else when a batch of records is there."""
    options = {**SKIP, "skip_limit": 2}
    run = trained(
        kind,
        scaler=scaler_of(),
        unscale=unscale,
        overflows=OVERFLOWS,
        catch=SkipLimitError,
        **options,
    )
    # Where the second batch of 7 is full; only a fused one has records of overflows.
    device = 13 if kind.startswith("fused") else 16
    assert run.caught == [10 if route == "host" else device]
    assert_same(run, scaled_by_hand(kind, left_out=OVERFLOWS, **options))


@unscaled_or_not
@fused_or_not
def test_an_error_after_the_step_leaves_no_trace(kind, unscale, route):
    run = trained(kind, Learning(fails_at=3), scaler=scaler_of(), unscale=unscale)
    assert run.caught == [2]
    needed = scaled_by_hand(kind)  # the step itself was taken
    torch.testing.assert_close(run.parameters, needed.parameters, rtol=1e-5, atol=1e-6)
    norms = [row[1] for row in needed.rows]
    assert [row[1] for row in run.rows[-20:]] == pytest.approx(norms[-20:], rel=1e-5)
