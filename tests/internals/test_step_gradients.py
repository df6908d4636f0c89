"""The gradients of one step, in what only GradScaler on a device makes of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradclip.gradients.policies import Settings
from gradclip.gradients.step import Decision, StepGradients
from gradclip.scopes.norm_indices import NormIndices

CPU = torch.device("cpu")


def step_gradients(*tensors: Tensor, labels=None, count=1, scale=None, overflow=None, **settings):
    scale = None if scale is None else torch.tensor(scale)
    overflow = None if overflow is None else torch.tensor(overflow)
    norm_indices = (
        None if labels is None else [NormIndices(torch.tensor([label])) for label in labels]
    )
    options = {"scale": scale, "overflow": overflow}
    return StepGradients([*tensors], norm_indices, Settings(**settings), count, CPU, **options)


def decide_(gradients: StepGradients, threshold: float) -> Decision:
    norms = gradients.norms()
    decision = gradients.decide_(norms, torch.full_like(norms, threshold))
    gradients.scale_(decision)
    return decision


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_bounds_hold_in_the_scale_of_the_gradients(scale, exceed):
    """Norms are those without the scale; a policy that skips looks at bounded copies first."""
    factor = scale or 1.0
    tensor = torch.tensor([3.0, 0.5]) * factor
    gradients = step_gradients(tensor, scale=scale, max_value=1.0, exceed=exceed)
    assert gradients.norms().tolist() == pytest.approx([math.hypot(3, 0.5)])
    assert gradients.norms().dtype == torch.float64
    decision = decide_(gradients, 2.0)
    assert tensor.tolist() == [factor, 0.5 * factor]
    assert decision.skip is False
    assert decision.coefficients.item() == 1.0
    assert decision.reduction.item() == pytest.approx(1.25**0.5 / math.hypot(3, 0.5))


@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_an_overflow_that_only_the_device_knows_leaves_the_gradients(overflow, exceed):
    """GradScaler skips that step: nothing is bounded or scaled, and no policy skips it."""
    tensor = torch.tensor([3.0, 0.5])
    gradients = step_gradients(tensor, max_value=2.0, exceed=exceed, overflow=overflow)
    decision = decide_(gradients, 1.0)
    assert bool(decision.skip) is (exceed == "skip" and not overflow)
    written = exceed == "scale" and not overflow
    assert (tensor.tolist() == [3.0, 0.5]) is not written
    assert (decision.reduction.item() == 1.0) is not written
