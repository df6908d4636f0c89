"""Advice for kinds of runs, and what comes of it when they are trained again."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

import gradclip
from gradclip import GradientClipper, MemorySink
from gradclip.report import Run
from gradclip.report.advice import advised
from gradclip.report.printing import print_report
from gradclip.report.summary import summarized

COUNT = 1200


def noise(spread=0.1):
    return np.exp(spread * np.random.default_rng(0).standard_normal(COUNT))


def quiet():
    return noise()


def spiky():
    norms = noise()
    norms[[300, 640, 641, 1100]] *= [30, 100, 50, 20]
    return norms


def drifting():
    return noise() * np.geomspace(1, 20, COUNT)


def exploding():
    norms = noise()
    norms[900:] *= np.geomspace(2, 1e6, COUNT - 900)
    return norms


def with_nan():
    norms = noise()
    norms[1000] = math.nan
    return norms


KINDS = {
    "quiet": quiet,
    "spiky": spiky,
    "drifting": drifting,
    "exploding": exploding,
}


def run_of(norms, threshold=math.nan):
    norms = np.asarray(norms, dtype=np.float64)
    limits = np.full(len(norms), threshold)
    clipped = np.fmin(norms, limits)
    return Run("run", np.arange(len(norms)), norms, clipped, limits, np.zeros(len(norms), bool))


def advice_for(norms, threshold=math.nan):
    run = run_of(norms, threshold)
    return advised(run, summarized(run))


def trained_again(norms, line, training):
    """Train with a line of code, and return which steps it clipped."""
    run, sink = training(), MemorySink()
    names = {"GradientClipper": GradientClipper, "optimizer": run.optimizer, "gradclip": gradclip}
    clipper = eval(
        line.replace("(optimizer, ", "(optimizer, log=sink, max_norm="), names, {"sink": sink}
    )
    run.take(*map(float, norms))
    clipper.close()
    return np.array([step.coefficient < 1 and not step.nonfinite for step in sink.steps])


def test_kinds_of_runs_get_different_lines():
    found = {kind: advice_for(make()) for kind, make in KINDS.items()}
    assert {kind: advice.kind for kind, advice in found.items()} == {kind: kind for kind in KINDS}
    assert len({advice.line for advice in found.values()}) == len(KINDS)
    assert len({advice.reason for advice in found.values()}) == len(KINDS)


def test_the_advice_for_a_quiet_run_changes_nothing_of_it(training):
    norms = quiet()
    assert not trained_again(norms, advice_for(norms).line, training).any()


def test_the_advice_for_a_spiky_run_clips_the_spikes_and_hardly_more(training):
    norms = spiky()
    clipped = trained_again(norms, advice_for(norms).line, training)
    assert clipped[[300, 640, 641, 1100]].all()
    assert clipped.mean() < 0.01


def test_the_advice_for_a_drifting_run_fits_it_to_the_end(training):
    norms = drifting()
    line = advice_for(norms).line
    assert trained_again(norms, line, training).mean() < 0.02
    norms[1000] *= 20
    assert trained_again(norms, line, training)[1000]


def test_the_advice_for_an_exploding_run_stops_the_explosion_alone(training):
    norms = exploding()
    clipped = trained_again(norms, advice_for(norms).line, training)
    assert not clipped[:900].any()
    assert clipped[920:].all()


def test_a_run_with_nan_is_exploding_and_the_step_is_left_out(training):
    norms = with_nan()
    advice = advice_for(norms)
    assert (advice.kind, 'nonfinite="skip"' in advice.line) == ("exploding", True)
    assert "Norms that were not finite: 1." in advice.reason
    assert not trained_again(norms, advice.line, training).any()


def test_a_single_enormous_norm_is_an_explosion():
    norms = quiet()
    norms[5] = 1e7
    assert advice_for(norms).kind == "exploding"


@pytest.mark.parametrize("norms", [[math.nan] * 5, [0.0] * 5])
def test_without_a_norm_above_0_the_culprits_are_sought_first(norms):
    advice = advice_for(norms)
    assert (advice.kind, advice.shares) == ("unknown", {})
    assert 'nonfinite="raise"' in advice.line


def test_each_threshold_has_the_share_that_it_would_have_clipped():
    norms = spiky()
    advice = advice_for(norms)
    assert len(advice.shares) >= 5
    for limit, share in advice.shares.items():
        assert share == (norms > limit).mean()
    assert advice.usual == pytest.approx(1, rel=0.02)


def test_thresholds_that_never_or_always_clipped_are_pointed_out():
    assert "never clipped" in " ".join(advice_for(quiet(), 100.0).warnings)
    assert "clipped 100% of the steps" in " ".join(advice_for(quiet(), 0.01).warnings)
    assert advice_for(quiet(), 1.0).warnings == ()
    assert "Only 50 steps" in " ".join(advice_for(quiet()[:50]).warnings)


def test_thresholds_have_two_digits_and_any_scale(training):
    for scale in (1e-12, 3.7, 1e25):
        norms = spiky() * scale
        line = advice_for(norms).line
        limit = float(line.rstrip(")").rpartition(" ")[2])
        assert limit == float(f"{limit:.2g}")
        assert 1 < limit / scale < 5


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 2e307])
def test_thresholds_at_the_ends_of_the_range_are_numbers(scale):
    limit = float(advice_for(quiet()[:300] * scale).line.rstrip(")").rpartition(" ")[2])
    assert 0 < limit < math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_gradients_do_not_change_the_advice(kind, training):
    """Most steps of an alternating training leave one of its optimizers without gradients."""
    norms = KINDS[kind]()
    idle = np.zeros((len(norms), 3))
    idle[:, 0] = norms
    assert advice_for(idle.ravel()).kind == kind
    assert float(advice_for(idle.ravel()).usual) > 0


def test_the_advice_for_a_quiet_run_with_one_larger_norm_still_changes_nothing(training):
    norms = quiet()[:90]
    norms[10] = 8.0  # too early to be held against others
    advice = advice_for(norms)
    assert advice.kind == "quiet"
    assert not trained_again(norms, advice.line, training).any()


def test_the_share_that_a_spike_line_clips_is_said():
    norms = np.random.default_rng(0).pareto(1.2, COUNT) + 1
    advice = advice_for(norms)
    limit = float(advice.line.rstrip(")").rpartition(" ")[2])
    assert (advice.kind, (norms > limit).mean() > 0.02) == ("spiky", True)
    assert f"{(norms > limit).mean():.2%} of the steps" in advice.reason


def test_every_kind_is_shown(training):
    for make in (*KINDS.values(), with_nan, lambda: [math.nan], lambda: [1.0]):
        for as_json in (False, True):
            stream = io.StringIO()
            print_report([run_of(make())] * 2, stream, as_json=as_json)
            assert "GradientClipper(optimizer" in stream.getvalue()
