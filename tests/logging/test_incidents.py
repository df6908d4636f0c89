"""The sentence about a step whose norm is not finite, or far above the norms before it."""

import math

import pytest
import torch
from torch import nn

from gradclip import GradientClipper, MemorySink, NonFiniteGradientError
from tests.support.curves import log_named

NAN, INF = math.nan, math.inf
BEFORE = "The norms before: 8.208, 8.8, 8.666, 8.055, 8.07."


def incident(change, **options):
    """Take 50 steps, the last with changed gradients; return the sentence about that one."""
    net, sink = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), MemorySink()
    optimizer, generator = torch.optim.SGD(net.parameters(), lr=0.0), torch.Generator()
    generator.manual_seed(0)
    with GradientClipper(optimizer, None, model=net, **{"log": sink, **options}) as clipper:
        for step in range(50):
            for parameter in net.parameters():
                parameter.grad = torch.rand(parameter.shape, generator=generator) + 1
            if step == 49:
                change(dict(net.named_parameters()))
            optimizer.step()
        assert clipper.steps == 50
    *before, last = [step.incident for step in sink.steps]
    assert before == [None] * 49, "usual steps have none"
    return last


def spoil(named):
    named["0.weight"].grad[0, :3] = NAN
    named["1.bias"].grad[1] = INF


def test_spike():
    """It names the parameters that carry it."""
    text = incident(lambda named: named["1.weight"].grad.mul_(100))
    assert text.startswith("The norm was ")
    assert "at step 49, above" in text
    assert "median of the last 49 norms above 0" in text
    assert "most of it in 1.weight (" in text
    assert "0.weight" not in text
    assert text.count(",") >= 5  # of the norms before


@pytest.mark.parametrize(
    ("norms", "order", "named"),
    [
        ([1.0, 1000.0], 2.0, "b (1000)"),
        ([1.0, 10.0, 2.0, 9.0], 2.0, "b (10), d (9)"),
        ([100.0] * 7, 2.0, None),
        ([1.0, 1000.0, 999.0], INF, "b (1000)"),
    ],
    ids=["one", "two", "five of seven", "infinity norm"],
)
def test_spike_names_as_few_parameters_as_possible(norms, order, named):
    """Together they have nine tenths of the power sum; there are five at most."""
    usual, names, sink = [norm / 1000 for norm in norms], "abcdefg"[: len(norms)], MemorySink()
    log_named(sink, names, *[usual] * 20, norms, max_norm=None, norm_type=order)
    found = sink.steps[-1].incident.split("most of it in ")[1].split(". The norms")[0]
    assert found == named or (named is None and found.count("(100)") == 5)


@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_norm_that_is_not_finite(policy, scope):
    """It names the parameters and counts their elements."""
    text = incident(spoil, nonfinite=policy, scope=scope)
    assert text.startswith("The norm was nan at step 49, from 0.weight (3 of 16 elements), 1.bias")
    assert "1.bias (1 of 2 elements)" in text
    assert BEFORE in text


def test_sums_out_of_range():
    text = incident(lambda named: named["0.bias"].grad.fill_(3e38), norm_type=12.0)
    assert "from 0.bias (the sum of its powers exceeds the range of float64)" in text


@pytest.mark.parametrize("log", [None, MemorySink()], ids=["no sink", "a sink"])
def test_error_shows_the_norms_before(log):
    with pytest.raises(NonFiniteGradientError) as caught:
        incident(spoil, nonfinite="raise", log=log)
    assert "is nan at step 49, from these parameters: 0.weight (3 of 16 elements)" in str(
        caught.value
    )
    assert BEFORE in str(caught.value)
