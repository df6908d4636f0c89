"""Advice of ``gradclip report``, and the effect of its line of code on the next training."""

import json
import math

import numpy as np
import pytest

import gradclip
from gradclip import GradientClipper, MemorySink
from gradclip.cli import main
from tests.support.report import log_norms, reported

COUNT = 1200
SPIKES = [300, 640, 641, 1100]


def noise(spread=0.1):
    return np.exp(spread * np.random.default_rng(0).standard_normal(COUNT))


def spiky():
    norms = noise()
    norms[SPIKES] *= [30, 100, 50, 20]
    return norms


def drifting():
    return noise() * np.geomspace(1, 20, COUNT)


def exploding():
    return noise() * np.r_[np.ones(900), np.geomspace(2, 1e6, COUNT - 900)]


KINDS = {"quiet": noise, "spiky": spiky, "drifting": drifting, "exploding": exploding}


@pytest.fixture
def advice(tmp_path):
    """Return the advice for a run with some norms."""

    def advice(norms, threshold=None):
        [run] = reported(log_norms(tmp_path / "run.jsonl", norms, threshold))
        return run["advice"]

    return advice


@pytest.fixture
def train(training):
    """Train with a line of code; return which steps it clipped."""

    def train(norms, line):
        run, sink = training(), MemorySink()
        names = {"GradientClipper": GradientClipper, "gradclip": gradclip, "sink": sink}
        line = line.replace("(optimizer, ", "(optimizer, log=sink, max_norm=")
        with eval(line, names, {"optimizer": run.optimizer}):
            run.take(*map(float, norms))
        return np.array([step.coefficient < 1 and not step.nonfinite for step in sink.steps])

    return train


def threshold_in(line):
    return float(line.rstrip(")").rpartition(" ")[2])


def test_each_kind_of_run_gets_its_own_line_and_reason(advice):
    found = {kind: advice(norms()) for kind, norms in KINDS.items()}
    assert {kind: each["kind"] for kind, each in found.items()} == {kind: kind for kind in KINDS}
    for field in ("line", "reason"):
        assert len({each[field] for each in found.values()}) == len(KINDS)


def test_quiet(advice, train):
    """The line changes nothing of the run and stops a bad batch."""
    line = advice(noise())["line"]
    assert not train(noise(), line).any()
    norms = noise()
    norms[400] *= 1e4
    assert train(norms, line).nonzero()[0].tolist() == [400]


def test_quiet_with_a_larger_norm_at_the_beginning(advice, train):
    """A norm too early to be compared with others is no spike, and is not clipped."""
    norms = noise()[:90]
    norms[10] = 8.0
    found = advice(norms)
    assert found["kind"] == "quiet"
    assert not train(norms, found["line"]).any()


def test_spiky(advice, train):
    """The line clips the spikes and hardly anything else."""
    clipped = train(spiky(), advice(spiky())["line"])
    assert clipped[SPIKES].all()
    assert clipped.mean() < 0.01


def test_the_share_that_a_spike_line_clips(advice):
    norms = np.random.default_rng(0).pareto(1.2, COUNT) + 1
    found = advice(norms)
    share = (norms > threshold_in(found["line"])).mean()
    assert found["kind"] == "spiky"
    assert share > 0.02
    assert f"would have clipped {share:.2%} of the steps" in found["reason"]


def test_drifting(advice, train):
    """The line fits the run from the beginning to the end, and a spike then is clipped."""
    norms = drifting()
    line = advice(norms)["line"]
    assert train(norms, line).mean() < 0.02
    norms[1000] *= 20
    assert train(norms, line)[1000]


def test_spikes_may_have_caused_a_drift_only_upwards(advice):
    rising, falling = drifting(), drifting()[::-1].copy()
    assert "spikes" not in advice(rising)["reason"]
    rising[300] *= 30
    falling[300] *= 30
    assert "spikes of this run may have caused the drift" in advice(rising)["reason"]
    assert "spikes" not in advice(falling)["reason"]


def test_norms_that_fall_only_at_the_beginning_are_no_drift(advice, train):
    norms = noise() * (1 + 5 * np.exp(-np.arange(COUNT) / 15))
    found = advice(norms)
    assert found["kind"] == "quiet"
    assert not train(norms, found["line"]).any()


def test_exploding(advice, train):
    """The line stops the explosion and clips nothing before it."""
    clipped = train(exploding(), advice(exploding())["line"])
    assert not clipped[:900].any()
    assert clipped[920:].all()


def test_exploding_before_a_usual_norm_is_known(advice, train):
    """The line clips nearly every step: the norms before may belong to the explosion."""
    norms = np.r_[noise()[:60], noise()[60:120] * np.geomspace(1, 1e6, 60), [math.nan] * 80]
    found = advice(norms)
    assert found["kind"] == "exploding"
    assert "too few to know the usual norm" in found["reason"]
    assert train(norms, found["line"])[:120].mean() > 0.95


def test_a_single_nan_is_an_explosion_and_its_step_is_skipped(advice, train):
    norms = noise()
    norms[1000] = math.nan
    found = advice(norms)
    assert found["kind"] == "exploding"
    assert 'nonfinite="skip"' in found["line"]
    assert "Norms that were not finite: 1." in found["reason"]
    assert not train(norms, found["line"]).any()


def test_a_single_enormous_norm_is_an_explosion(advice):
    norms = noise()
    norms[5] = 1e7
    assert advice(norms)["kind"] == "exploding"


@pytest.mark.parametrize("norms", [[math.nan] * 5, [0.0] * 5])
def test_without_a_norm_above_0_the_cause_is_looked_for_first(advice, norms):
    found = advice(norms)
    assert (found["kind"], found["shares"], found["threshold"]) == ("unknown", {}, None)
    assert 'nonfinite="raise"' in found["line"]


def test_a_threshold_clips_the_share_that_is_said(advice, train):
    found = advice(spiky())
    assert len(found["shares"]) >= 5
    assert found["usual"] == pytest.approx(1, rel=0.02)
    for threshold, share in found["shares"].items():
        assert train(spiky(), f"GradientClipper(optimizer, {threshold})").mean() == share


def test_warnings(advice):
    assert "never clipped" in " ".join(advice(noise(), 100.0)["warnings"])
    assert "clipped 100% of the steps" in " ".join(advice(noise(), 0.01)["warnings"])
    assert advice(noise(), 1.0)["warnings"] == []
    assert "Only 50 steps" in " ".join(advice(noise()[:50])["warnings"])


def test_a_run_that_was_clipped_is_judged_by_its_norms_before_clipping(advice, train):
    found = advice(noise(), 1.0)
    assert found["kind"] == "quiet"
    assert f"this training clipped {(noise() > 1).mean():.2%} of its steps" in found["reason"]
    assert not train(noise(), found["line"]).any()


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-12, 3.7, 1e25, 2e307])
def test_a_threshold_has_two_digits_and_is_finite_and_above_0(advice, scale):
    threshold = threshold_in(advice(noise()[:300] * scale)["line"])
    assert 0 < threshold < math.inf
    assert threshold == float(f"{threshold:.2g}")


@pytest.mark.parametrize("kind", KINDS)
def test_steps_without_gradients_do_not_change_the_advice(advice, kind):
    """In an alternating training, most steps leave one of the optimizers without gradients."""
    idle = np.zeros((COUNT, 3))
    idle[:, 0] = KINDS[kind]()
    found = advice(idle.ravel())
    assert found["kind"] == kind
    assert found["usual"] > 0


@pytest.mark.parametrize("norms", [*(make() for make in KINDS.values()), [math.nan], [1.0]])
def test_the_printed_report_ends_with_the_line(capsys, tmp_path, norms):
    path = str(log_norms(tmp_path / "run.jsonl", norms))
    assert main(["report", path, path]) == 0
    printed = capsys.readouterr().out
    assert main(["report", path, "--json"]) == 0
    [run] = json.loads(capsys.readouterr().out)
    assert printed.count(path) == 2
    assert printed.endswith(f"{run['advice']['reason']}\n\n    {run['advice']['line']}\n")
    assert (f"This run is {run['advice']['kind']}. " in printed) == (run["advice"]["kind"] in KINDS)
    for threshold, share in run["advice"]["shares"].items():
        assert f"{float(threshold):.3g}" in printed
        assert f"{share:.2%}" in printed
