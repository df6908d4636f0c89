"""A step: gradients are scaled to the threshold, recorded, and otherwise left alone."""

import math

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper, SkipLimitError
from tests.support.clippers import sgd, stepped, weights_of
from tests.support.reference import bits_of, gradient_norm, parameter_with


def test_gradients_are_scaled_to_the_threshold():
    """The step takes them, and the record holds 0-d tensors for one norm."""
    optimizer = sgd([3.0], [4.0])
    clipper = GradientClipper(optimizer, 1.0)
    assert clipper.last is None
    optimizer.step()
    assert [p.item() for p in weights_of(optimizer)] == pytest.approx([0.4, 0.2], rel=1e-6)
    assert gradient_norm(weights_of(optimizer)) == pytest.approx(1.0, rel=2e-7)
    last = clipper.last
    expected = {"norm": 5.0, "clipped_norm": 1.0, "threshold": 1.0, "coefficient": 0.2}
    for name, value in expected.items():
        field = getattr(last, name)
        assert (field.shape, field.dtype) == ((), torch.float64)
        assert field.item() == pytest.approx(value, rel=1e-12)
    assert (last.step, last.nonfinite.dtype, last.nonfinite.item()) == (0, torch.bool, False)
    assert clipper.labels == ("global",)


def test_other_parameters_of_the_model_do_not_count():
    """Those that the optimizer does not hold: their gradients are in no norm and stay."""
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    model.bias.grad = torch.tensor([12.0])
    clipper = GradientClipper(torch.optim.SGD([model.weight], lr=0.1), 1.0, model=model)
    clipper.step()
    assert clipper.last.norm.item() == 5.0
    assert gradient_norm([model.weight]) == pytest.approx(1.0, rel=1e-6)
    assert model.bias.grad.tolist() == [12.0]


OBSERVED = [
    (gradient, 1.0, {"exceed": "observe", "nonfinite": nonfinite, "max_value": 2.0})
    for nonfinite in ("zero", "skip", "raise", "propagate")
    for gradient in ([3.0, 4.0], [3.0, math.nan])
]


@pytest.mark.parametrize(
    ("gradient", "max_norm", "options"),
    [
        ([3.0, 4.0], 5.0, {}),
        ([3e8, 4e8], None, {}),
        ([3.0, math.inf], 1.0, {"nonfinite": "propagate", "max_value": 0.5}),
        *OBSERVED,
    ],
)
def test_nothing_is_written(gradient, max_norm, options):
    """Not at the threshold, without one, while observing, or when a norm propagates."""
    optimizer = sgd(gradient)
    [weight] = weights_of(optimizer)
    version = weight.grad._version
    clipper = GradientClipper(optimizer, max_norm, **options)
    optimizer.step()
    assert weight.grad._version == version
    assert weight.tolist() == pytest.approx([1 - value for value in gradient], nan_ok=True)
    norm = math.hypot(*gradient)
    assert clipper.last.norm.item() == pytest.approx(norm, nan_ok=True)
    assert clipper.last.threshold.item() == (math.inf if max_norm is None else max_norm)
    assert (bool(clipper.last.nonfinite), clipper.skipped) == (not norm < math.inf, 0)
    assert clipper.clip_rate() == (options.get("exceed") == "observe" and norm < math.inf)


@pytest.mark.parametrize("steps", [-1, True, 1.5, None])
def test_an_invalid_number_of_steps_is_refused(steps):
    clipper = stepped(sgd([3.0, 4.0]))
    with pytest.raises(ArgumentError, match="steps is .*: give a whole number >= 0"):
        clipper.steps = steps
    assert clipper.steps == 1


def test_a_threshold_of_zero_erases():
    optimizer = sgd([3.0, 4.0])
    GradientClipper(optimizer, 0)
    optimizer.step()
    assert weights_of(optimizer)[0].tolist() == [1.0, 1.0]
    weights_of(optimizer)[0].grad = torch.zeros(2)
    optimizer.step()
    assert weights_of(optimizer)[0].grad.tolist() == [0.0, 0.0]


def test_a_tied_parameter_counts_and_is_scaled_once():
    weight = parameter_with(torch.tensor([3.0, 4.0]))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([weight, weight], lr=0.0)
    clipper = GradientClipper(optimizer, 1.0)
    optimizer.step()
    assert clipper.last.norm.item() == 5.0
    assert gradient_norm([weight]) == pytest.approx(1.0, rel=1e-6)


def test_a_bound_does_not_hide_an_infinite_element():
    clipper = GradientClipper(optimizer := sgd([1.0, math.inf]), 10.0, max_value=1.0)
    optimizer.step()
    assert bool(clipper.last.nonfinite)
    assert weights_of(optimizer)[0].grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("max_norm", "expected"), [(None, [-2.0, -2.0]), (1.0, [-(0.5**0.5)] * 2)])
def test_a_bound_holds_for_the_sums_of_sparse_entries(max_norm, expected):
    """Entries of one element add up, are bounded, and then scaled."""
    weight = nn.Parameter(torch.zeros(3, 1))
    weight.grad = torch.sparse_coo_tensor([[0, 0, 1]], [[2.0], [2.0], [3.0]], (3, 1))
    clipper = GradientClipper(torch.optim.SGD([weight], lr=1.0), max_norm, max_value=2.0)
    clipper.step()
    assert clipper.last.norm.item() == pytest.approx(5.0)
    assert weight.flatten().tolist() == pytest.approx([*expected, 0.0], rel=1e-6)


LARGE, NAN = [3.0, 4.0], [math.nan, 1.0]


@pytest.mark.parametrize(
    ("max_norm", "options", "gradient", "left"),
    [
        (5.0, {}, LARGE, LARGE),  # at its threshold
        (1.0, {"nonfinite": "zero"}, NAN, [0.0, 0.0]),  # no matter of exceed
        (2.0, {"max_value": 0.5}, LARGE, [0.5, 0.5]),  # within after the bound
    ],
)
def test_what_does_not_exceed_is_not_skipped(max_norm, options, gradient, left):
    clipper = stepped(optimizer := sgd(gradient), max_norm, exceed="skip", **options)
    assert clipper.skipped == 0
    assert weights_of(optimizer)[0].grad.tolist() == left
    norm, clipped = clipper.last.norm.item(), clipper.last.clipped_norm.item()
    assert norm == pytest.approx(math.hypot(*gradient), nan_ok=True)
    assert clipped == pytest.approx(math.hypot(*left))


@pytest.mark.parametrize("bad", [LARGE, NAN])
def test_too_many_skipped_steps_in_a_row_raise(bad):
    [weight] = weights_of(optimizer := sgd(bad, momentum=0.9))
    clipper = GradientClipper(optimizer, 1.0, exceed="skip", nonfinite="skip", skip_limit=3)

    def step(gradient) -> None:
        weight.grad = torch.tensor(gradient)
        optimizer.step()

    for gradient in (bad, bad, [0.3, 0.4], bad, bad):
        step(gradient)
    before = weight.tolist()
    with pytest.raises(SkipLimitError, match="3 steps in a row were skipped, up to step 5: param"):
        step(bad)
    assert weight.tolist() == before
    assert bits_of(weight.grad) == bits_of(torch.tensor(bad))
    assert (clipper.steps, clipper.skipped) == (6, 5)
    with pytest.raises(SkipLimitError, match="up to step 6"):
        step(bad)
    step([0.3, 0.4])
    step(bad)
    assert (clipper.steps, clipper.skipped) == (9, 7)
