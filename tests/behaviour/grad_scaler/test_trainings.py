"""Whole trainings under a GradScaler, on both routes, are as those clipped by hand."""

import math
from itertools import pairwise

import pytest

from gradclip import GradientClipper, NonFiniteGradientError, SkipLimitError
from tests.support import scaled_training as amp
from tests.support.reference import gradient_norm
from tests.support.twins import (
    Twins,
    assert_tensors_close,
    joint_scaler,
    layers,
    values_of,
)

BOUNDED_SKIP = {"exceed": "skip", "max_value": 0.1, "max_norm": 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "raise"},
        {**amp.SKIP, "nonfinite": "skip", "skip_limit": 3},
        {"exceed": "observe"},
        {"max_value": 0.3},
        BOUNDED_SKIP,
        {"norm_type": math.inf},
    ],
    ids=str,
)
@amp.unscaled_or_not
@amp.all_kinds
def test_overflowed_steps_are_as_if_they_had_not_been(kind, unscale, options, route):
    run = amp.trained_as_by_hand(kind, unscale=unscale, **options)
    assert {0.5, 2.0} <= {after / before for before, after in pairwise(run.scales)}
    assert not any(nonfinite for _, _, _, nonfinite, _, _ in run.rows)
    assert run.clipper.skipped > 0 or options.get("exceed") != "skip"
    assert 0 < run.clipper.clip_rate() < 1 or amp.SPIKE in options.values()


@amp.unscaled_or_not
@pytest.mark.parametrize("kind", [kind for kind in amp.KINDS if kind != "fused SGD"])
def test_the_first_steps_may_overflow(kind, unscale, route):
    """Not of fused SGD with momentum: torch's own first step then keeps uninitialised memory."""
    amp.trained_as_by_hand(kind, unscale=unscale, overflows=(0, 1, 2, 11), nonfinite="raise")


@pytest.mark.parametrize("scale", [False, None], ids=["disabled scaler", "no scaler"])
@pytest.mark.parametrize("options", [{}, amp.SKIP, BOUNDED_SKIP], ids=str)
@amp.all_kinds
def test_without_a_scale(kind, options, scale, route):
    amp.trained_as_by_hand(kind, scale=scale, unscale=scale is False, **options)


@pytest.mark.parametrize("scale", [True, None], ids=["scaler", "no scaler"])
@pytest.mark.parametrize(
    "options",
    [
        {"nonfinite": "skip"},
        {"nonfinite": "skip", **amp.SKIP},
        {"nonfinite": "skip", "max_value": 0.3},
        {"nonfinite": "zero", **amp.SKIP},
    ],
    ids=str,
)
@amp.some_kinds
def test_gradients_that_become_nan_after_unscaling(kind, options, scale, route):
    """A scaler has found no overflow in these: they meet the clipper's policy."""
    poisoned = (2, 7, 8, 12)
    run = amp.trained_as_by_hand(
        kind, scale=scale, unscale=bool(scale), poisoned=poisoned, **options
    )
    assert sum(row[3] for row in run.rows) == len(poisoned)
    assert run.clipper.skipped > 0


@amp.fused_or_not
@amp.unscaled_or_not
def test_groups_with_a_norm_of_their_own(kind, unscale, route):
    first, *others = layers(3)
    parts = [[first], others]
    groups = [{"params": [first], "max_norm": 0.5}, {"params": others}]
    optimizer, scaler, norms = amp.scaled_optimizer(kind, groups), joint_scaler(), []
    clipper = GradientClipper(optimizer, 0.25)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(amp.scaled_loss(0, optimizer) * (math.inf if step == 2 else 1)).backward()
        norms = [gradient_norm(part) / scaler.get_scale() for part in parts]
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert clipper.labels == ("group 0", "global")
    assert clipper.last.norm.tolist() == pytest.approx(norms, rel=1e-6)
    assert clipper.last.clipped_norm.tolist() == pytest.approx([0.5, 0.25], rel=1e-6)
    assert [gradient_norm(part) for part in parts] == pytest.approx([0.5, 0.25], rel=1e-6)
    assert clipper.steps == 3


@amp.unscaled_or_not
@amp.all_kinds
def test_accumulated_gradients_are_clipped_once(kind, unscale):
    twins, scaler = Twins(lambda: [amp.scaled_optimizer(kind)]), joint_scaler()
    [ours], [theirs] = twins.ours, twins.theirs
    for step in range(amp.STEPS):
        scaler.scale(amp.scaled_loss(step, ours)).backward()
        amp.scaled_loss(step, theirs).backward()
        if step % 3 < 2:
            continue
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        twins.take_by_hand()
        twins.zero_grad()
    assert twins.clipper.steps == amp.STEPS // 3
    assert_tensors_close(values_of(ours), values_of(theirs))


@pytest.mark.parametrize("options", [{}, amp.SKIP, {"max_value": 0.3}], ids=str)
@amp.unscaled_or_not
@amp.fused_or_not
def test_a_rule_learns_only_from_steps_that_were_taken(kind, unscale, options, route):
    rule = amp.Learning(options.get("max_norm", 1.0))
    amp.trained(kind, **{**options, "max_norm": rule}, unscale=unscale)
    taken = [row[:3] for row in amp.scaled_by_hand(kind, **options)[1] if not row[4]]
    assert len(taken) == amp.STEPS - len(amp.OVERFLOWS) - (
        len(amp.SPIKES) if options == amp.SKIP else 0
    )
    first = 1 if route == "device" else 0  # the device alone knows which steps were skipped
    for learned, row in zip(rule.learned, taken, strict=True):
        assert learned[first:] == pytest.approx(row[first:], rel=1e-5)


BROKEN = [
    # 3, 13 and 15 stand beside overflows, 5 is one itself; 9 and 10 are skipped by the policy
    ("max_norm", {}, (3, 8, 9, 10, 15, 23)),
    ("a hook", {}, (2, 3, 5, 9, 10, 13)),
    ("a hook", amp.SKIP, (2, 3, 5, 9, 10, 13)),
    ("a hook", amp.SKIP, (3, 6, 7, 16)),
]


@pytest.mark.parametrize(("raising", "options", "broken"), BROKEN, ids=str)
@amp.unscaled_or_not
@amp.some_kinds
def test_steps_that_raised(kind, unscale, raising, options, broken, route):
    """The rest is as if they had not been."""
    run = amp.trained_as_by_hand(kind, unscale=unscale, broken=broken, raising=raising, **options)
    # GradScaler itself calls the step of an overflow only if the optimizer heeds its marks.
    calls = kind.startswith("fused")
    assert run.caught == [step for step in broken if calls or step not in amp.OVERFLOWS]


@amp.all_kinds
def test_an_error_for_a_nonfinite_norm_counts_as_skipped(kind, route):
    options = {"nonfinite": "raise", "poisoned": (7, 16), "catch": NonFiniteGradientError}
    run = amp.trained_as_by_hand(kind, unscale=True, **options)
    assert run.caught == [7, 16]
    assert run.clipper.skipped == 2


@amp.unscaled_or_not
@amp.fused_or_not
def test_too_many_skips_raise_and_leave_no_trace(kind, unscale, route):
    """At once where the host knows them, else when a batch of records is there."""
    run = amp.trained_as_by_hand(
        kind, unscale=unscale, catch=SkipLimitError, skip_limit=2, **amp.SKIP
    )
    # Where the second batch of 7 is full; only a fused one has records of overflows.
    device = 13 if kind.startswith("fused") else 16
    assert run.caught == [10 if route == "host" else device]


@amp.unscaled_or_not
@amp.fused_or_not
def test_an_error_after_the_step_leaves_no_trace(kind, unscale, route):
    run = amp.trained(kind, amp.Learning(fails_at=3), unscale=unscale, overflows=())
    assert run.caught == [2]
    optimizer, rows = amp.scaled_by_hand(kind, left_out=())  # the step itself was taken
    assert_tensors_close(values_of(run.optimizer), values_of(optimizer))
    assert [row[1] for row in run.rows[-20:]] == pytest.approx([row[1] for row in rows[-20:]], 1e-5)
