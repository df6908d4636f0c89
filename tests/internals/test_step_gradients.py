"""The gradients of one step, in what only GradScaler on a device makes of them."""

from __future__ import annotations

import pytest
import torch

from gradclip.gradients.policies import Settings
from gradclip.gradients.step import StepGradients


@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_an_overflow_that_only_the_device_knows_leaves_the_gradients(overflow, exceed):
    """GradScaler skips that step: nothing is bounded or scaled, and no policy skips it."""
    tensor, settings = torch.tensor([3.0, 0.5]), Settings(max_value=2.0, exceed=exceed)
    gradients = StepGradients(
        [tensor], None, settings, 1, torch.device("cpu"), overflow=torch.tensor(overflow)
    )
    norms = gradients.norms()
    decision = gradients.decide_(norms, torch.ones_like(norms))
    gradients.scale_(decision)
    assert bool(decision.skip) is (exceed == "skip" and not overflow)
    written = exceed == "scale" and not overflow
    assert (tensor.tolist() == [3.0, 0.5]) is not written
    assert (decision.reduction.item() == 1.0) is not written
