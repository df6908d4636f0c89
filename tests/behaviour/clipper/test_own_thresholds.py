"""A threshold of the user's own: what it is given, and what it may return."""

import math

import pytest
import torch

from gradclip import ArgumentError, GradientClipper, Threshold
from tests.support.clippers import weights_of
from tests.support.reference import parameter_with


class HalfOfNorm(Threshold):
    """Allows half of every norm, and notes what it observes."""

    def __init__(self, answer=lambda norms: norms / 2) -> None:
        self.answer, self.started, self.observed = answer, [], []

    def start(self, labels, device, dtype):
        self.started.append((labels, device.type, dtype))

    def thresholds(self, norms, context):
        return self.answer(norms)

    def observe(self, norms, clipped_norms, context):
        self.observed.append((norms.tolist(), clipped_norms.tolist(), context.present.tolist()))


def after_one_step(rule: Threshold, *gradients: float, keys=(...,), **options) -> GradientClipper:
    """Return a clipper after a step, with a parameter group for each gradient and its key."""
    groups = [
        {
            "params": [parameter_with(torch.tensor([gradient]))],
            **({} if key is ... else {"max_norm": key}),
        }
        for gradient, key in zip(gradients, keys, strict=True)
    ]
    clipper = GradientClipper(torch.optim.SGD(groups, lr=0.0), rule, **options)
    clipper.step()
    return clipper


def test_it_rules_the_norms_that_no_group_rules():
    """Thresholds stand in the order of the labels; it observes its own norm alone."""
    clipper = after_one_step(rule := HalfOfNorm(), 8.0, 6.0, 4.0, 2.0, keys=(1.0, ..., 0.25, None))
    assert rule.started == [(("global",), "cpu", torch.float64)]
    by_label = dict(zip(clipper.labels, clipper.last.threshold.tolist(), strict=True))
    assert sorted(by_label.values()) == [0.25, 1.0, 3.0]
    assert by_label["global"] == 3.0
    assert rule.observed == [([6.0], [3.0], [True])]


@pytest.mark.parametrize(
    "returned",
    [
        torch.ones(2, dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64),
        torch.empty(0, dtype=torch.float64),
        torch.ones(1, device="meta"),
        torch.tensor([math.nan]),
        torch.tensor([-1.0]),
        torch.tensor([1]),
        torch.tensor([True]),
        torch.ones(1).to_sparse(),
        1.0,
        None,
        [1.0],
    ],
    ids=str,
)
def test_what_is_no_vector_of_thresholds_is_an_error(returned):
    """Before anything is written."""
    gradient = torch.tensor([8.0])
    optimizer = torch.optim.SGD([parameter_with(gradient)], lr=1.0)
    GradientClipper(optimizer, HalfOfNorm(lambda norms: returned))
    with pytest.raises(ArgumentError, match=r"HalfOfNorm.thresholds\(\) returned .*: return "):
        optimizer.step()
    assert [gradient.item(), weights_of(optimizer)[0].item()] == [8.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_thresholds_of_another_precision_are_converted(dtype):
    last = after_one_step(HalfOfNorm(lambda norms: norms.to(dtype) / 2), 8.0).last
    assert (last.threshold.item(), last.threshold.dtype) == (4.0, torch.float64)


def test_the_threshold_of_a_norm_that_is_not_finite_may_be_nan():
    assert math.isnan(after_one_step(HalfOfNorm(), math.nan).last.threshold.item())


def test_what_it_writes_to_is_its_own():
    """Neither its arguments nor the record of the step change."""

    class Careless(HalfOfNorm):
        def thresholds(self, norms, context):
            context.present.zero_()
            return norms.mul_(0.5)

        def observe(self, norms, clipped_norms, context):
            super().observe(norms, clipped_norms, context)
            context.present.zero_()
            norms.zero_()

    clipper = after_one_step(rule := Careless(), 8.0, exceed="observe")
    clipper.step()
    assert clipper.last.norm.item() == 8.0
    assert rule.observed == [([8.0], [4.0], [True])] * 2
