"""Steps that a sentence is written for."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradclip import GradientClipper, MemorySink, NonFiniteGradientError
from gradclip.records.incidents import incident_of
from gradclip.records.norm_history import DEVIATIONS, FEWEST, WINDOW, NormHistory

NAN, INF = math.nan, math.inf


def history(*norms: float) -> NormHistory:
    found = NormHistory()
    for norm in norms:
        found.add(norm)
    return found


def line(norms: list[float]) -> float:
    """The median and ten median deviations, as it is defined."""
    median = statistics.median(norms)
    return median + DEVIATIONS * statistics.median(abs(norm - median) for norm in norms)


LEVELS = st.integers(1, 12).map(float) | st.floats(0.01, 100.0)


@given(st.lists(LEVELS, min_size=FEWEST, max_size=2 * WINDOW), st.floats(0.5, 3.0))
def test_a_spike_is_above_the_median_and_ten_median_deviations(norms, factor):
    found, recent = history(*norms), norms[-WINDOW:]
    limit = line(recent)
    assert found.median == statistics.median(recent)
    assert found.median + DEVIATIONS * found.deviation() == pytest.approx(limit, rel=1e-12)
    for norm in (limit * factor, *norms[:20]):
        if abs(norm - limit) > 1e-5 * limit:
            assert found.is_spike(norm) == (norm > limit)


def test_a_norm_on_the_line_is_no_spike():
    norms = [*map(float, range(1, 101))]
    assert line(norms) == 50.5 + 10 * 25
    assert not history(*norms).is_spike(300.5)
    assert history(*norms).is_spike(300.6)


def test_few_norms_make_no_spike():
    assert not history(*[1.0] * (FEWEST - 1)).is_spike(1e9)
    assert history(*[1.0] * FEWEST).is_spike(1e9)


def test_norms_that_tell_nothing_are_not_held_against():
    norms = [0.0, 2.0, NAN, 0.0, INF, 2.1] * 20
    found = history(*norms)
    assert found.median == pytest.approx(2.05)
    assert not found.is_spike(2.5)
    assert found.is_spike(2.7)


def test_only_the_last_norms_count():
    assert history(*[100.0] * 200, *[1.0, 1.1] * (WINDOW // 2)).is_spike(50.0)


def test_rounding_of_equal_norms_is_no_spike():
    norms = history(*[5.0] * 50)
    assert not norms.is_spike(5.0 * (1 + 1e-9))
    assert norms.is_spike(5.01)


def test_the_norms_just_before_are_shown():
    assert str(history(1.0, 2.0, 3.0, NAN, 0.0, 123456.0)) == "2, 3, nan, 0, 1.235e+05"
    assert str(history()) == "not known"


def test_a_usual_step_has_no_sentence():
    assert incident_of(3, 1.0, lambda: None, history(*[1.0, 1.1] * 50)) is None


# In a training


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    for parameter in made.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    return made


def incidents(change, nonfinite: str = "zero", **options) -> list[str | None]:
    """Take 50 steps, of which the gradients of the last are changed; return the sentences."""
    net = model()
    optimizer, sink = torch.optim.SGD(net.parameters(), lr=0.0), MemorySink()
    with GradientClipper(
        optimizer, None, model=net, log=sink, nonfinite=nonfinite, **options
    ) as clipper:
        generator = torch.Generator().manual_seed(0)
        for step in range(50):
            for parameter in net.parameters():
                parameter.grad = torch.rand(parameter.shape, generator=generator) + 1
            if step == 49:
                change(dict(net.named_parameters()))
            optimizer.step()
        assert clipper.steps == 50
    return [step.incident for step in sink.steps]


def test_a_spike_is_told_with_the_parameters_that_carry_it():
    *before, found = incidents(lambda named: named["1.weight"].grad.mul_(100))
    assert before == [None] * 49
    assert found.startswith("The norm was ")
    assert "at step 49, above" in found
    assert "median of the last 49 norms above 0" in found
    assert "most of it in 1.weight (" in found
    assert "0.weight" not in found
    assert found.count(",") >= 5  # of the norms before


def spoil(named):
    named["0.weight"].grad[0, :3] = NAN
    named["1.bias"].grad[1] = INF


@pytest.mark.parametrize("policy", ["zero", "skip", "propagate"])
@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_a_norm_that_is_not_finite_is_told_with_names_and_elements(policy, scope):
    *before, found = incidents(spoil, nonfinite=policy, scope=scope)
    assert before == [None] * 49
    assert found.startswith("The norm was nan at step 49, from 0.weight (3 of 16 elements), 1.bias")
    assert "1.bias (1 of 2 elements)" in found
    assert "The norms before: 8.208, 8.8, 8.666, 8.055, 8.07." in found


def test_sums_out_of_range_are_told_as_such():
    [*_, found] = incidents(lambda named: named["0.bias"].grad.fill_(3e38), norm_type=12.0)
    assert "from 0.bias (the sum of its powers exceeds the range of float64)" in found


def test_the_error_of_a_norm_that_is_not_finite_shows_the_norms_before():
    for log in (None, MemorySink()):
        net = model()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        with GradientClipper(optimizer, None, model=net, nonfinite="raise", log=log):
            for _ in range(7):
                optimizer.step()
            spoil(dict(net.named_parameters()))
            with pytest.raises(NonFiniteGradientError) as caught:
                optimizer.step()
    assert "at step 7, from these parameters: 0.weight (3 of 16 elements)" in str(caught.value)
    assert "The norms before: 0.5477, 0.5477, 0.5477, 0.5477, 0.5477." in str(caught.value)
