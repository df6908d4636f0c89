"""Facts that ``gradclip report`` finds in a run."""

import math

import numpy as np
import pytest

from tests.support.report import log_norms, reported


@pytest.fixture
def summary(tmp_path):
    """Return the facts of a run with some norms."""

    def summary(norms):
        [run] = reported(log_norms(tmp_path / "run.jsonl", norms))
        return run

    return summary


def quiet(count):
    return 1 + 0.05 * np.random.default_rng(0).standard_normal(count)


def test_quantiles_mean_and_largest_are_those_of_the_finite_norms(summary):
    found = summary([*range(1, 1001), math.nan, math.inf])
    assert found["quantiles"] == {
        str(percent): pytest.approx(1 + 999 * percent / 100)
        for percent in (10.0, 50.0, 90.0, 99.0, 99.9)
    }
    assert (found["mean"], found["largest"], found["steps"]) == (500.5, 1000, 1002)
    assert found["nonfinite_steps"] == 2
    assert found["spike_line"] == 500.5 + 10 * 250


def test_spikes_are_listed_by_their_height(summary):
    norms = quiet(2000)
    norms[[700, 1234, 1999]] = 20, 300, 5
    found = summary(norms)
    assert found["spikes"] == 3
    spikes = [(spike["step"], spike["norm"]) for spike in found["largest_spikes"]]
    assert spikes == [(1234, 300), (700, 20), (1999, 5)]
    assert [spike["usual"] for spike in found["largest_spikes"]] == pytest.approx([1] * 3, rel=0.05)


@pytest.mark.parametrize("step", [20, 29, 55, 99, 100, 101, 109, 110, 4999, 41_060])
def test_no_spike_is_overlooked(summary, step):
    """From the 21st step on, at the borders of windows, blocks and groups of blocks."""
    norms = quiet(max(step + 1, 500))
    norms[step] = 10
    assert [spike["step"] for spike in summary(norms)["largest_spikes"]] == [step]


def test_a_level_that_rises_slowly_is_a_trend_and_no_spike(summary):
    found = summary(quiet(4000) * np.geomspace(1, 10, 4000))
    assert found["spikes"] == 0
    assert found["trend"] == pytest.approx(10**0.75, rel=0.05)
    assert summary(quiet(4000))["trend"] == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_norms_that_stay_the_same_have_no_spikes(summary, norm):
    assert summary([norm] * 500)["spikes"] == 0


def test_few_or_no_finite_norms(summary):
    one = summary([3.0])
    assert (one["mean"], one["largest"], one["spikes"], one["trend"]) == (3, 3, 0, None)
    none = summary([math.nan, math.inf])
    assert (none["nonfinite_steps"], none["mean"], {*none["quantiles"].values()}) == (
        2,
        None,
        {None},
    )
