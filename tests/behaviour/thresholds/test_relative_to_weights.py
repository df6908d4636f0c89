"""AGC as a hook: policies, labels and records are the same in one pass and in several."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gradclip import GradClipError, GradientClipper, MemorySink, Scope
from gradclip.thresholds import RelativeToWeights
from tests.support.reference import norm_of

SEVERAL_PASSES = {"max_value": 1e30}
"""A bound that no element reaches: the clipper bounds, and so measures, before it scales."""
SCOPES = {
    "unit": "unit",
    "parameter": "parameter",
    "exclusions": Scope("unit", exclude=["1.*", "2.bias"]),
    "of a function": lambda name, _: None if name.startswith("1") else name,
    "one shared norm": lambda name, _: "bias" if name.endswith("bias") else name,
    "global": "global",
}
POLICIES = {
    "as it comes": {},
    "propagate": {"nonfinite": "propagate"},
    "observe": {"exceed": "observe"},
    "skip what exceeds": {"exceed": "skip"},
    "skip what is not finite": {"nonfinite": "skip"},
    "raise": {"nonfinite": "raise"},
    "1-norm": {"norm_type": 1.0},
    "infinity norm": {"norm_type": math.inf},
}


def set_gradients(step: int, network: nn.Module) -> None:
    """Set gradients: some rows above their threshold, or none, one that is not finite, or missing,
    shared, sliced and sparse ones."""
    generator = torch.Generator().manual_seed(step)
    parameters = [*network.parameters()]
    for parameter in parameters:
        size = torch.rand(parameter.shape[:1], generator=generator) * (1e-6 if step == 1 else 0.1)
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        size = size.view(-1, *[1] * (parameter.dim() - 1)).double()
        parameter.grad = (values * size).to(parameter.dtype)
    if step == 2:
        parameters[0].grad[1, 0] = math.nan
        parameters[3].grad[2] = math.inf
    if step == 3:
        parameters[2].grad = None
    if step == 4 and parameters[3].dtype is torch.float32:
        parameters[3].grad = parameters[1].grad = torch.ones(4)
    if step == 5:
        parameters[0].grad = torch.rand(4, 6, generator=generator)[:, ::2]
    if step == 6:
        parameters[2].grad = parameters[2].grad.to_sparse()


class AgcTraining(NamedTuple):
    """What a training leaves behind."""

    weights: list[Tensor]
    gradients: list[Tensor]
    records: list[tuple[Tensor, ...]]
    logged: list[tuple[Any, ...]]
    counts: tuple[int, float]
    errors: list[str]


def agc_training(
    *, log: bool, rule: RelativeToWeights | None = None, change: Any = None, **options: Any
) -> AgcTraining:
    """Take eight steps of a small network; a change is made before the fifth."""
    rule = rule or RelativeToWeights(0.05)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(network[2].weight)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
    sink = MemorySink(per_parameter="all")
    gradients, records, errors = [], [], []
    given = {"scope": "unit", "model": network, "log": sink if log else None, **options}
    with GradientClipper(optimizer, rule, **given) as clipper:
        for step in range(8):
            if step == 4 and change is not None:
                change(network, optimizer, rule)
            set_gradients(step, network)
            try:
                optimizer.step()
            except GradClipError as error:
                errors.append(str(error))
            gradients += [
                p.grad.to_dense().clone() for p in network.parameters() if p.grad is not None
            ]
            last = clipper.last
            values = (last.norm, last.threshold, last.coefficient, last.clipped_norm)
            records.append((*values, last.nonfinite))
        clipper.flush()
        counts = clipper.skipped, clipper.clip_rate()
        labels = clipper.labels
    logged = [
        ([float(number or 0) for number in row[2:11]], row.incident, row.parameter_norms)
        for row in sink.steps
    ]
    assert len(records[-1][0].flatten()) == len(labels)
    weights = [p.detach().clone() for p in network.parameters()]
    return AgcTraining(weights, gradients, records, logged, counts, errors)


def assert_same_training(one: AgcTraining, other: AgcTraining) -> None:
    """Check that two lives are the same but for the last bit of a root."""
    assert (one.counts, one.errors) == (other.counts, other.errors)
    for found, expected in ((one.weights, other.weights), (one.gradients, other.gradients)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(one.records, other.records, rtol=1e-14, atol=0, equal_nan=True)
    assert len(one.logged) == len(other.logged)
    for (numbers, incident, norms), twin in zip(one.logged, other.logged, strict=True):
        assert numbers == pytest.approx(twin[0], rel=1e-12, nan_ok=True)
        assert incident == twin[1]
        assert dict(norms) == pytest.approx(dict(twin[2]), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("log", [False, True], ids=["bare", "logged"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES.keys())
def test_one_pass_and_several_make_the_same_training(scope, policy, log):
    quick = agc_training(log=log, scope=scope, **policy)
    assert_same_training(quick, agc_training(log=log, scope=scope, **policy, **SEVERAL_PASSES))


def test_eps_floor_and_cap_hold_in_one_pass():
    rule = RelativeToWeights(0.05, eps=0.5, floor=0.03, cap=0.034)
    quick = agc_training(log=False, rule=rule)
    assert_same_training(quick, agc_training(log=False, rule=rule, **SEVERAL_PASSES))
    thresholds = quick.records[0][1]
    assert 0.03 in thresholds
    assert 0.034 in thresholds
    assert int(((thresholds > 0.03) & (thresholds < 0.034)).sum()) > 0


def add_group(network, optimizer, rule):
    network.append(nn.Linear(2, 3))
    optimizer.add_param_group({"params": network[3].parameters()})


def replace(network, optimizer, rule):
    network[2].weight = optimizer.param_groups[0]["params"][4] = nn.Parameter(torch.ones(2, 4))


def other_dtype(network, optimizer, rule):
    network[1].to(torch.float64)


def other_factor(network, optimizer, rule):
    rule.factor = 0.01


@pytest.mark.parametrize("change", [add_group, replace, other_dtype, other_factor])
@pytest.mark.parametrize("scope", ["unit", "parameter"])
def test_a_training_may_change_between_two_steps(scope, change):
    quick = agc_training(log=True, change=change, scope=scope)
    assert_same_training(
        quick, agc_training(log=True, change=change, scope=scope, **SEVERAL_PASSES)
    )


@pytest.mark.parametrize(("scope", "limit"), [("unit", 0.1 * 2**0.5), ("parameter", 0.2)])
def test_a_parameter_group_keeps_its_own_threshold(scope, limit):
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "max_norm": 0.5}]
    groups.append({"params": [weights[2]], "max_norm": None})
    optimizer = torch.optim.SGD(groups, lr=0.0)
    with GradientClipper(optimizer, RelativeToWeights(0.1), scope=scope):
        for weight in weights:
            weight.grad = torch.full((2, 2), 3.0)
        optimizer.step()
    rows = [*weights[0].grad] if scope == "unit" else [weights[0].grad]
    assert [norm_of([row]) for row in rows] == pytest.approx([limit] * len(rows))
    assert weights[1].grad.norm().item() == pytest.approx(0.5)
    assert weights[2].grad.tolist() == [[3.0] * 2] * 2


class HalfOfThat(RelativeToWeights):
    """A rule of a user's own."""

    def limits(self, norms, context):
        return super().limits(norms, context) / 2


@pytest.mark.parametrize("scope", ["unit", "parameter"])
def test_a_rule_derived_from_it_is_asked(scope):
    weight = nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.full((3, 4), 5.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    with GradientClipper(optimizer, HalfOfThat(0.1), scope=scope) as clipper:
        optimizer.step()
    rows = [*weight.grad] if scope == "unit" else [weight.grad]
    limit = 0.05 * norm_of([torch.ones(4 if scope == "unit" else 12)])
    assert [norm_of([row]) for row in rows] == pytest.approx([limit] * len(rows))
    assert clipper.last.threshold.flatten().tolist() == pytest.approx([limit] * len(rows))


def test_gradients_below_their_threshold_are_not_written():
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    with GradientClipper(optimizer, RelativeToWeights(0.1), scope="unit"):
        weights[0].grad, weights[1].grad = torch.full((2, 2), 0.01), torch.ones(2, 2)
        versions = [weight.grad._version for weight in weights]
        optimizer.step()
    assert weights[0].grad._version == versions[0]
    assert weights[1].grad._version > versions[1]
    assert weights[0].grad.tolist() == [[pytest.approx(0.01)] * 2] * 2
