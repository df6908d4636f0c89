from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gradclip import (
    GradientClipper,
    NonFiniteGradientError,
    Sink,
    SkipLimitError,
    StateError,
    Threshold,
)

GOOD, LARGE, BAD = (0.3, 0.4), (3.0, 4.0), (math.nan, 1.0)


class Rows(Sink):
    def __init__(self) -> None:
        self.rows = []

    def write(self, steps):
        self.rows += steps


class Run:
    """A parameter under momentum, stepped with gradients that are given."""

    def __init__(self, max_norm=1.0, *, kind=torch.optim.SGD, **options) -> None:
        self.weight = nn.Parameter(torch.ones(2))
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        self.optimizer = kind([self.weight], lr=0.1, **momentum)
        self.clipper = GradientClipper(self.optimizer, max_norm, **options)

    def step(self, gradient) -> None:
        self.weight.grad = torch.tensor(gradient)
        self.optimizer.step()

    def state(self):
        return copy.deepcopy((self.weight.detach(), self.optimizer.state_dict()))


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and str(one[1]) == str(other[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("options", "gradient"),
    [({"exceed": "skip"}, LARGE), ({"nonfinite": "skip"}, BAD)],
    ids=["exceed", "nonfinite"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_skipped_step_leaves_everything_and_is_counted_and_logged(kind, options, gradient, first):
    sink = Rows()
    run = Run(kind=kind, log=sink, **options)
    if not first:
        run.step(GOOD)
    before = run.state()
    run.step(gradient)
    assert same(run.state(), before)
    assert str(run.weight.grad.tolist()) == str(torch.tensor(gradient).tolist())
    assert run.clipper.skipped == 1
    assert run.clipper.steps == 2 - first
    assert run.clipper.last.skipped is True
    assert run.clipper.last.coefficient.item() == 1.0
    run.step(GOOD)
    assert not same(run.state(), before)
    run.clipper.close()
    assert [row.skipped for row in sink.rows][-2:] == [True, False]
    assert sink.rows[-1].skipped_steps == 1


def test_a_norm_at_its_threshold_is_not_skipped():
    run = Run(5.0, exceed="skip")
    run.step(LARGE)
    assert run.clipper.skipped == 0
    assert run.weight.grad.tolist() == [3.0, 4.0]


def test_what_is_not_finite_is_no_matter_of_exceed():
    run = Run(exceed="skip", nonfinite="zero")
    run.step(BAD)
    assert run.clipper.skipped == 0
    assert run.weight.grad.tolist() == [0.0, 0.0]


def test_skipping_writes_nothing_even_where_an_element_exceeds_its_bound():
    run = Run(1.0, exceed="skip", max_value=2.0)
    run.step(LARGE)
    assert run.clipper.skipped == 1
    assert run.weight.grad.tolist() == [3.0, 4.0]
    assert run.clipper.last.norm.item() == 5.0
    run.step((2.5, 0.0))  # (2, 0) after the bound
    assert run.clipper.skipped == 2


def test_the_bound_counts_before_a_norm_exceeds():
    run = Run(2.0, exceed="skip", max_value=0.5)
    run.step(LARGE)
    assert run.clipper.skipped == 0
    assert run.weight.grad.tolist() == [0.5, 0.5]
    assert run.clipper.last.norm.item() == 5.0
    assert run.clipper.last.clipped_norm.item() == pytest.approx(0.5**0.5)


def test_a_skipped_norm_is_not_observed():
    class Seen(Threshold):
        seen = ()

        def thresholds(self, norms, context):
            return torch.ones_like(norms)

        def observe(self, norms, clipped_norms, context):
            self.seen = (*self.seen, *norms.tolist())

    rule = Seen()
    run = Run(rule, exceed="skip", nonfinite="skip")
    for gradient in (GOOD, LARGE, BAD, GOOD):
        run.step(gradient)
    assert rule.seen == pytest.approx((0.5, 0.5))


def test_a_step_that_raises_after_a_skip_has_its_gradients_back():
    run = Run(exceed="skip")
    gradient = torch.tensor(LARGE)
    run.weight.grad = gradient

    def fail(*_):
        raise OSError("no disk")

    hook = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(OSError, match="no disk"):
        run.optimizer.step()
    assert run.weight.grad is gradient
    hook.remove()
    run.optimizer.step()
    assert run.weight.tolist() == [1.0, 1.0]
    assert run.clipper.steps == 1  # the step that raised was never taken


@pytest.mark.parametrize("bad", [LARGE, BAD])
def test_so_many_skipped_steps_in_a_row_raise(bad):
    run = Run(exceed="skip", nonfinite="skip", skip_limit=3)
    for gradient in (bad, bad, GOOD, bad, bad):
        run.step(gradient)
    before = run.state()
    with pytest.raises(SkipLimitError, match="3 steps in a row were skipped, up to step 5: param"):
        run.step(bad)
    assert same(run.state(), before)
    assert str(run.weight.grad.tolist()) == str(torch.tensor(bad).tolist())
    assert (run.clipper.steps, run.clipper.skipped) == (6, 5)
    with pytest.raises(SkipLimitError, match="up to step 6"):
        run.step(bad)
    run.step(GOOD)
    run.step(bad)
    assert (run.clipper.steps, run.clipper.skipped) == (9, 7)


def test_a_limit_of_one_raises_at_once():
    run = Run(nonfinite="skip", skip_limit=1)
    with pytest.raises(SkipLimitError, match="1 steps in a row"):
        run.step(BAD)


def test_a_run_that_resumes_goes_on_counting_the_skips_in_a_row():
    run = Run(exceed="skip", skip_limit=3)
    run.step(LARGE)
    run.step(LARGE)
    resumed = Run(exceed="skip", skip_limit=3)
    resumed.clipper.load_state_dict(run.clipper.state_dict())
    with pytest.raises(SkipLimitError, match="up to step 2"):
        resumed.step(LARGE)


def test_a_state_without_the_count_is_refused():
    run = Run()
    state = run.clipper.state_dict()
    del state["counters"]["skipped_in_a_row"]
    with pytest.raises(StateError, match="skipped_in_a_row"):
        run.clipper.load_state_dict(state)


def test_raising_counts_as_a_skipped_step_and_is_logged():
    sink = Rows()
    run = Run(nonfinite="raise", log=sink)
    run.step(GOOD)
    before = run.state()
    with pytest.raises(NonFiniteGradientError, match="nan at step 1"):
        run.step(BAD)
    assert same(run.state(), before)
    run.step(GOOD)
    run.clipper.close()
    assert [(row.step, row.skipped, row.nonfinite) for row in sink.rows] == [
        (0, False, False),
        (1, True, True),
        (2, False, False),
    ]


def test_raising_in_a_closure_leaves_the_parameters():
    run = Run(nonfinite="raise")

    def closure():
        run.weight.grad = torch.tensor(BAD)
        return 1.0

    with pytest.raises(NonFiniteGradientError):
        run.optimizer.step(closure)
    assert run.weight.tolist() == [1.0, 1.0]
    assert (run.clipper.steps, run.clipper.skipped) == (1, 1)


def test_a_closure_is_skipped_by_its_last_evaluation():
    run = Run(exceed="skip")
    before = run.state()

    def closure():
        run.weight.grad = torch.tensor(LARGE)
        return 7.0

    assert run.optimizer.step(closure) == 7.0
    assert same(run.state(), before)
    assert run.weight.grad.tolist() == [3.0, 4.0]
    assert (run.clipper.steps, run.clipper.skipped) == (1, 1)


def test_observing_never_skips():
    run = Run(exceed="observe", nonfinite="skip", skip_limit=1)
    run.step(LARGE)
    run.step(BAD)
    assert run.clipper.skipped == 0
    assert run.weight.isnan().any()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_an_impossible_limit_is_refused(limit):
    with pytest.raises(ValueError, match="skip_limit is .*: give a whole number >= 1"):
        Run(exceed="skip", skip_limit=limit)
