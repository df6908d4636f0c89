"""What happens if a norm exceeds its threshold, or is NaN or infinite."""

import math

import pytest
import torch
from torch import nn

from gradclip import (
    GradientClipper,
    MemorySink,
    NonFiniteGradientError,
    SkipLimitError,
)
from tests.support.clippers import sgd, weights_of
from tests.support.reference import bits_of

GOOD, LARGE, NAN, INF = [0.3, 0.4], [3.0, 4.0], [math.nan, 1.0], [1.0, math.inf]


class Steps:
    """Two parameters under momentum or Adam, stepped with given gradients of the first."""

    def __init__(self, max_norm=1.0, *, kind=torch.optim.SGD, **options) -> None:
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        self.optimizer = sgd(GOOD, [0.0], kind=kind, lr=0.1, **momentum)
        self.weight, self.other = weights_of(self.optimizer)
        self.clipper = GradientClipper(self.optimizer, max_norm, **options)

    def step(self, gradient) -> None:
        self.weight.grad = torch.tensor(gradient)
        self.optimizer.step()

    def state(self) -> str:
        """Return the parameters and the optimizer's state in words."""
        return repr((self.weight, self.other, self.optimizer.state_dict()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("options", "gradient"),
    [
        ({"exceed": "skip"}, LARGE),
        ({"nonfinite": "skip"}, NAN),
        ({"nonfinite": "skip"}, INF),
        ({"exceed": "skip", "max_value": 2.0}, LARGE),
    ],
    ids=["exceed", "nan", "inf", "bounded"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_skipped_step_changes_nothing_and_is_counted(kind, options, gradient, first):
    """Neither parameters nor state nor gradients; it is counted and logged."""
    sink = MemorySink()
    run = Steps(kind=kind, log=sink, **options)
    if not first:
        run.step(GOOD)
    run.weight.grad = given = torch.tensor(gradient)
    before = run.state()
    run.optimizer.step()
    assert run.state() == before
    assert run.weight.grad is given
    assert bits_of(given) == bits_of(torch.tensor(gradient))
    assert (run.clipper.skipped, run.clipper.steps) == (1, 2 - first)
    assert run.clipper.last.skipped is True
    assert run.clipper.last.coefficient.item() == 1.0
    run.step(GOOD)
    assert run.state() != before
    run.clipper.close()
    assert [step.skipped for step in sink.steps][-2:] == [True, False]
    assert sink.steps[-1].skipped_steps == 1


@pytest.mark.parametrize(
    ("max_norm", "options", "gradient", "left"),
    [
        (5.0, {}, LARGE, LARGE),  # at its threshold
        (1.0, {"nonfinite": "zero"}, NAN, [0.0, 0.0]),  # no matter of exceed
        (2.0, {"max_value": 0.5}, LARGE, [0.5, 0.5]),  # within after the bound
    ],
)
def test_what_does_not_exceed_is_not_skipped(max_norm, options, gradient, left):
    run = Steps(max_norm, exceed="skip", **options)
    run.step(gradient)
    assert run.clipper.skipped == 0
    assert run.weight.grad.tolist() == left
    norm, clipped = run.clipper.last.norm.item(), run.clipper.last.clipped_norm.item()
    assert norm == pytest.approx(math.hypot(*gradient), nan_ok=True)
    assert clipped == pytest.approx(math.hypot(*left))


# skip_limit


@pytest.mark.parametrize("bad", [LARGE, NAN])
def test_too_many_skipped_steps_in_a_row_raise(bad):
    run = Steps(exceed="skip", nonfinite="skip", skip_limit=3)
    for gradient in (bad, bad, GOOD, bad, bad):
        run.step(gradient)
    before = run.weight.tolist()
    with pytest.raises(SkipLimitError, match="3 steps in a row were skipped, up to step 5: param"):
        run.step(bad)
    assert run.weight.tolist() == before
    assert bits_of(run.weight.grad) == bits_of(torch.tensor(bad))
    assert (run.clipper.steps, run.clipper.skipped) == (6, 5)
    with pytest.raises(SkipLimitError, match="up to step 6"):
        run.step(bad)
    run.step(GOOD)
    run.step(bad)
    assert (run.clipper.steps, run.clipper.skipped) == (9, 7)


# nonfinite


def test_raise_names_the_parameters_and_changes_nothing():
    """The step counts as skipped and is logged, and the next one goes on."""
    sink = MemorySink()
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipper = GradientClipper(optimizer, 1.0, nonfinite="raise", model=model, log=sink)
    optimizer.step()
    model[1].weight.grad[0, 1] = math.nan
    before = [(bits_of(p), bits_of(p.grad)) for p in model.parameters()]
    with pytest.raises(NonFiniteGradientError, match=r"nan at step 1.*1\.weight \(1 of 2 elem"):
        optimizer.step()
    assert [(bits_of(p), bits_of(p.grad)) for p in model.parameters()] == before
    assert (clipper.steps, clipper.skipped) == (2, 1)
    model[1].weight.grad[0, 1] = 1.0
    optimizer.step()
    clipper.close()
    logged = [(step.step, step.skipped, step.nonfinite) for step in sink.steps]
    assert logged == [(0, False, False), (1, True, True), (2, False, False)]
