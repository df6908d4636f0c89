"""A step: gradients are scaled to the threshold, recorded, and otherwise left alone."""

import math

import pytest
import torch
from torch import nn

from gradclip import ArgumentError, GradientClipper
from tests.support.clippers import sgd, weights_of
from tests.support.reference import gradient_norm, parameter_with


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


def test_a_function_of_the_step():
    """It is called with the index of the step, which can be set."""
    optimizer, indices = sgd([3.0, 4.0]), []
    thresholds = {0: None, 1: 2.0, 41: 1.0}
    clipper = GradientClipper(optimizer, lambda step: indices.append(step) or thresholds[step])
    for index, threshold in thresholds.items():
        weights_of(optimizer)[0].grad = torch.tensor([3.0, 4.0])
        clipper.steps = index
        optimizer.step()
        assert clipper.last.threshold.item() == (threshold or math.inf)
        expected = min(5.0, threshold or math.inf)
        assert gradient_norm(weights_of(optimizer)) == pytest.approx(expected, rel=1e-6)
    assert indices == [*thresholds]
    assert (clipper.last.step, clipper.steps) == (41, 42)
    for steps in (-1, True, 1.5, None):
        with pytest.raises(ArgumentError, match="steps is .*: give a whole number >= 0"):
            clipper.steps = steps
    assert clipper.steps == 42


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


# Elements


@pytest.mark.parametrize("exceed", ["scale", "observe"])
def test_elements_are_bounded_before_the_norm(exceed):
    clipper = GradientClipper(optimizer := sgd([30.0, 4.0]), 1.0, max_value=3.0, exceed=exceed)
    optimizer.step()
    last = clipper.last
    assert last.norm.item() == pytest.approx(math.hypot(30, 4), rel=1e-12)
    assert last.clipped_norm.item() == pytest.approx(1.0, rel=1e-12)
    assert (last.norm * last.coefficient).item() == pytest.approx(1.0, rel=1e-12)
    expected = [math.sqrt(0.5)] * 2 if exceed == "scale" else [30.0, 4.0]
    assert weights_of(optimizer)[0].grad.tolist() == pytest.approx(expected, rel=1e-6)


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


# Closures


@pytest.mark.parametrize("by", ["position", "keyword", "clipper"])
def test_the_gradients_of_a_closure_are_clipped(by):
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clipper, calls = GradientClipper(optimizer, 1.0), []

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = (weight * torch.tensor([3.0, 4.0])).sum()
        loss.backward()
        return loss

    ways = {
        "position": lambda: optimizer.step(closure),
        "keyword": lambda: optimizer.step(closure=closure),
        "clipper": lambda: clipper.step(closure),
    }
    assert ways[by]().item() == 0.0
    assert (len(calls), clipper.steps) == (1, 1)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-6)
