"""Steps that only the device knows to be skipped: what is written, and what a rule observes."""

import pytest
import torch
from torch import nn

from gradclip import ClipRecord, Threshold
from gradclip.gradients.norm_thresholds import NormThresholds
from gradclip.gradients.policies import Settings
from gradclip.gradients.step import StepGradients
from gradclip.ranks.layout import RankLayout
from gradclip.scopes.labels import NormLabels
from gradclip.scopes.scope import Scope

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


@pytest.mark.parametrize("overflow", [YES, NO])
@pytest.mark.parametrize("exceed", ["scale", "skip"])
def test_an_overflow_leaves_the_gradients(overflow, exceed):
    """GradScaler skips that step: nothing is bounded or scaled, and no policy skips it."""
    tensor, settings = torch.tensor([3.0, 0.5]), Settings(max_value=2.0, exceed=exceed)
    gradients = StepGradients([tensor], None, settings, 1, CPU, overflow=overflow)
    norms = gradients.norms()
    decision = gradients.decide_(norms, torch.ones_like(norms))
    gradients.scale_(decision)
    assert bool(decision.skip) is (exceed == "skip" and not overflow)
    written = exceed == "scale" and not overflow
    assert (tensor.tolist() == [3.0, 0.5]) is not written
    assert (decision.reduction.item() == 1.0) is not written


class HalvingRule(Threshold):
    observed = ()

    def thresholds(self, norms, context):
        return norms / 2

    def observe(self, norms, clipped_norms, context):
        self.observed += (norms.item(), clipped_norms.item(), context.present.item())


@pytest.mark.parametrize(
    ("asks", "flags", "partial", "observed"),
    [
        (False, {}, True, ()),  # the norm of some gradients
        (False, {"skipped": YES}, False, (8.0, 4.0, False)),
        (False, {"skipped": NO}, False, (8.0, 4.0, True)),
        (False, {"overflow": YES}, False, (8.0, 4.0, False)),
        (True, {"skipped": YES}, False, (8.0, 4.0, True)),
        (True, {"skipped": YES, "overflow": YES}, False, (8.0, 4.0, False)),
    ],
)
def test_what_a_rule_observes(asks, flags, partial, observed):
    """A skip known to the device alone counts as a norm without a gradient."""
    rule, norms = HalvingRule(), torch.tensor([8.0], dtype=torch.float64)
    rule.observes_skipped = asks
    labels = NormLabels([torch.optim.SGD([nn.Parameter(torch.ones(1))])], Scope())
    gradients = StepGradients([torch.ones(1)], None, Settings(), 1, CPU, partial=partial)
    thresholds = NormThresholds(rule, labels, RankLayout(None, labels, {}, False), CPU, 2.0)
    found = thresholds.at_step(gradients, norms, 0)
    thresholds.observe(ClipRecord(0, 0.0, norms, found, torch.full_like(norms, 0.5), **flags))
    assert rule.observed == observed
