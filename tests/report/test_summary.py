from __future__ import annotations

import math

import numpy as np
import pytest

from gradclip.records.norm_history import FEWEST, WINDOW
from gradclip.report import Run
from gradclip.report.summary import summarized


def run(norms, *, steps=None, threshold=math.nan, skipped=()):
    norms = np.asarray(norms, dtype=np.float64)
    steps = np.arange(len(norms)) if steps is None else np.asarray(steps)
    clipped = np.minimum(norms, threshold) if threshold == threshold else norms
    left_out = np.isin(np.arange(len(norms)), skipped)
    return Run("run", steps, norms, clipped, np.full(len(norms), threshold), left_out)


def quiet(count, seed=0):
    return 1 + 0.05 * np.random.default_rng(seed).standard_normal(count)


def test_quantiles_mean_and_largest_are_those_of_the_finite_norms():
    norms = [*range(1, 1001), math.nan, math.inf]
    found = summarized(run(norms))
    assert found.quantiles == {
        percent: pytest.approx(1 + 999 * percent / 100) for percent in (10, 50, 90, 99, 99.9)
    }
    assert (found.mean, found.largest, found.steps) == (500.5, 1000, 1002)
    assert (found.nonfinite_steps, found.first_step, found.last_step) == (2, 0, 1001)
    assert found.spike_line == 500.5 + 10 * 250


def test_steps_that_were_clipped_or_skipped_are_counted():
    found = summarized(run([1, 3, 5, math.nan], threshold=2.0, skipped=[3]))
    assert (found.clip_rate, found.skipped_steps) == (2 / 3, 1)


def test_spikes_are_found_with_their_steps_and_what_was_usual():
    norms = quiet(2000)
    norms[[700, 1234, 1999]] = 20, 300, 5
    found = summarized(run(norms, steps=np.arange(2000) * 2 + 10))
    assert found.spikes == 3
    assert [(spike.step, spike.norm) for spike in found.largest_spikes] == [
        (2478, 300),
        (1410, 20),
        (4008, 5),
    ]
    assert [spike.usual for spike in found.largest_spikes] == pytest.approx([1] * 3, rel=0.05)


PLACES = (FEWEST, FEWEST + 9, 55, *(WINDOW + n for n in (-1, 0, 1, 9, 10)), 4999, 40_960 + 100)


@pytest.mark.parametrize("place", PLACES)
def test_no_spike_is_overlooked_wherever_it_is(place):
    norms = quiet(45_000)
    norms[place] = 10
    assert [spike.step for spike in summarized(run(norms)).largest_spikes] == [place]


def test_a_level_that_rises_slowly_is_no_spike_but_a_trend():
    norms = quiet(4000) * np.geomspace(1, 10, 4000)
    found = summarized(run(norms))
    assert found.spikes == 0
    assert found.trend == pytest.approx(10**0.75, rel=0.05)
    assert summarized(run(quiet(4000))).trend == pytest.approx(1, rel=0.01)


def test_norms_that_do_not_move_have_no_spikes():
    assert summarized(run(np.ones(500))).spikes == 0
    assert summarized(run(np.zeros(500))).spikes == 0


def test_few_or_no_finite_norms_are_summed_up_too():
    one = summarized(run([3.0]))
    assert (one.mean, one.largest, one.spikes) == (3, 3, 0)
    assert math.isnan(one.trend)
    none = summarized(run([math.nan, math.inf]))
    assert none.nonfinite_steps == 2
    assert math.isnan(none.mean)
    assert all(map(math.isnan, none.quantiles.values()))


def test_a_million_steps_take_little_memory():
    import tracemalloc

    long = run(np.tile(quiet(10_000), 100))
    tracemalloc.start()
    summarized(long)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6
