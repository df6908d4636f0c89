"""What a rule observes of steps that only the device knows to be skipped, or that are partial."""

import pytest
import torch
from torch import nn

from gradclip import ClipRecord, Threshold
from gradclip.gradients.norm_thresholds import NormThresholds
from gradclip.gradients.policies import Settings
from gradclip.gradients.step import StepGradients
from gradclip.scopes.labels import NormLabels
from gradclip.scopes.scope import Scope

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


class HalvingRule(Threshold):
    observed = ()

    def thresholds(self, norms, context):
        return norms / 2

    def observe(self, norms, clipped_norms, context):
        self.observed += (norms.item(), clipped_norms.item(), context.present.item())


@pytest.mark.parametrize(
    ("asks", "flags", "partial", "observed"),
    [
        (False, {}, False, (8.0, 4.0, True)),
        (False, {}, True, ()),  # the norm of some gradients
        (False, {"skipped": True}, False, ()),
        (False, {"skipped": YES}, False, (8.0, 4.0, False)),
        (False, {"skipped": NO}, False, (8.0, 4.0, True)),
        (False, {"overflow": YES}, False, (8.0, 4.0, False)),
        (False, {"overflow": NO}, False, (8.0, 4.0, True)),
        (True, {"skipped": True}, False, (8.0, 4.0, True)),
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
    thresholds = NormThresholds(rule, labels, CPU, 2.0)
    found = thresholds.at_step(gradients, norms, 0)
    skipped = bool(flags.get("skipped", False))
    coefficients = torch.full_like(norms, 1.0 if skipped else 0.5)
    thresholds.observe(ClipRecord(0, 0.0, norms, found, coefficients, **flags))
    assert rule.observed == observed
