"""Advice of ``gradclip report``, and the effect of its line of code on the next training."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import gradclip
from gradclip import GradientClipper, JsonlSink, MemorySink
from gradclip.cli import main
from tests.support.clippers import Training
from tests.support.report import log_norms, reported

COUNT = 1200


def spiked(norms, spikes):
    """Return norms of which some are multiplied."""
    norms = norms.copy()
    norms[[*spikes]] *= [*spikes.values()]
    return norms


QUIET = np.exp(0.1 * np.random.default_rng(0).standard_normal(COUNT))
SPIKES = {300: 30, 640: 100, 641: 50, 1100: 20}
SPIKY = spiked(QUIET, SPIKES)
DRIFTING = QUIET * np.geomspace(1, 20, COUNT)
EXPLODING = QUIET * np.r_[np.ones(900), np.geomspace(2, 1e6, COUNT - 900)]
FALLING = QUIET * (1 + 5 * np.exp(-np.arange(COUNT) / 15))
KINDS = {"quiet": QUIET, "spiky": SPIKY, "drifting": DRIFTING, "exploding": EXPLODING}


@pytest.fixture
def advice(summary):
    """Return the advice for a run with some norms."""
    return lambda norms, threshold=None: summary(norms, threshold)["advice"]


def clipper_by(line, optimizer, log):
    """Return what an advised line makes, with a log."""
    logging = partial(GradientClipper, log=log)
    return eval(line, {"GradientClipper": logging, "gradclip": gradclip, "optimizer": optimizer})


def clipped_by(line, norms):
    """Take steps with a line of code; return which of them it clipped."""
    run, sink = Training(), MemorySink()
    with clipper_by(line, run.optimizer, sink):
        run.take(*map(float, norms))
    return np.array([step.coefficient < 1 and not step.nonfinite for step in sink.steps])


def threshold_in(line):
    return float(line.rstrip(")").rpartition(" ")[2])


def test_each_kind_of_run_gets_its_own_line_and_reason(advice):
    """Also where most steps leave one of the optimizers without gradients, as they alternate."""
    found = {kind: advice(norms) for kind, norms in KINDS.items()}
    assert {kind: each["kind"] for kind, each in found.items()} == {kind: kind for kind in KINDS}
    for field in ("line", "reason"):
        assert len({each[field] for each in found.values()}) == len(KINDS)
    for kind, norms in KINDS.items():
        idle = np.zeros((COUNT, 3))
        idle[:, 0] = norms
        alternating = advice(idle.ravel())
        assert (alternating["kind"], alternating["usual"] > 0) == (kind, True)


@pytest.mark.parametrize(
    ("norms", "threshold", "kind", "words"),
    [
        (QUIET, None, "quiet", ""),
        (QUIET, 1.0, "quiet", f"this training clipped {(QUIET > 1).mean():.2%} of its steps"),
        (spiked(QUIET, {10: 8.0})[:90], None, "quiet", ""),  # too early to be compared with others
        (FALLING, None, "quiet", ""),  # at the beginning only, which is no drift
        (spiked(QUIET, {1000: math.nan}), None, "exploding", "Norms that were not finite: 1."),
    ],
)
def test_a_line_that_changes_nothing_of_the_run(advice, norms, threshold, kind, words):
    """A run that was clipped is judged by its norms before clipping; a NaN is skipped."""
    found = advice(norms, threshold)
    assert found["kind"] == kind
    assert words in found["reason"]
    assert ('nonfinite="skip"' in found["line"]) == (kind == "exploding")
    assert not clipped_by(found["line"], norms).any()


@pytest.mark.parametrize(
    ("advised", "norms", "spikes", "share"),
    [
        (QUIET, spiked(QUIET, {400: 1e4}), [400], 0.0),  # a bad batch
        (SPIKY, SPIKY, [*SPIKES], 0.006),
        (DRIFTING, spiked(DRIFTING, {1000: 20}), [1000], 0.02),  # from the beginning to the end
    ],
)
def test_a_line_that_clips_spikes_and_hardly_anything_else(advice, advised, norms, spikes, share):
    clipped = clipped_by(advice(advised)["line"], norms)
    assert clipped[spikes].all()
    assert np.delete(clipped, spikes).mean() <= share


def test_exploding(advice):
    """The line stops the explosion and clips nothing before it."""
    clipped = clipped_by(advice(EXPLODING)["line"], EXPLODING)
    assert not clipped[:900].any()
    assert clipped[920:].all()
    assert advice(spiked(QUIET, {5: 1e7}))["kind"] == "exploding"


def test_exploding_before_a_usual_norm_is_known(advice):
    """The line clips nearly every step: the norms before may belong to the explosion."""
    norms = np.r_[QUIET[:60], QUIET[60:120] * np.geomspace(1, 1e6, 60), [math.nan] * 80]
    found = advice(norms)
    assert found["kind"] == "exploding"
    assert "too few to know the usual norm" in found["reason"]
    assert clipped_by(found["line"], norms)[:120].mean() > 0.95


def test_the_share_that_a_spike_line_clips(advice):
    norms = np.random.default_rng(0).pareto(1.2, COUNT) + 1
    found = advice(norms)
    share = (norms > threshold_in(found["line"])).mean()
    assert found["kind"] == "spiky"
    assert share > 0.02
    assert f"would have clipped {share:.2%} of the steps" in found["reason"]


def test_spikes_may_have_caused_a_drift_only_upwards(advice):
    said = "spikes of this run may have caused the drift"
    rising, falling = DRIFTING, DRIFTING[::-1]
    cases = [rising, spiked(rising, {300: 30}), falling, spiked(falling, {300: 30})]
    assert [said in advice(norms)["reason"] for norms in cases] == [False, True, False, False]


@pytest.mark.parametrize("norms", [[math.nan] * 5, [0.0] * 5])
def test_without_a_norm_above_0_the_cause_is_looked_for_first(advice, norms):
    found = advice(norms)
    assert (found["kind"], found["shares"], found["threshold"]) == ("unknown", {}, None)
    assert 'nonfinite="raise"' in found["line"]


def test_a_threshold_clips_the_share_that_is_said(advice):
    found = advice(SPIKY)
    assert len(found["shares"]) >= 5
    assert found["usual"] == pytest.approx(1, rel=0.02)
    for threshold, share in found["shares"].items():
        assert clipped_by(f"GradientClipper(optimizer, {threshold})", SPIKY).mean() == share


def test_warnings(advice):
    assert "never clipped" in " ".join(advice(QUIET, 100.0)["warnings"])
    assert "clipped 100% of the steps" in " ".join(advice(QUIET, 0.01)["warnings"])
    assert advice(QUIET, 1.0)["warnings"] == []
    assert "Only 50 steps" in " ".join(advice(QUIET[:50])["warnings"])


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-12, 3.7, 1e25, 2e307])
def test_a_threshold_has_two_digits_and_is_finite_and_above_0(advice, scale):
    threshold = threshold_in(advice(QUIET[:300] * scale)["line"])
    assert 0 < threshold < math.inf
    assert threshold == float(f"{threshold:.2g}")


@pytest.mark.parametrize("norms", [*KINDS.values(), [math.nan], [1.0]])
def test_the_printed_report_ends_with_the_line(capsys, tmp_path, norms):
    path = str(log_norms(tmp_path / "run.jsonl", norms))
    assert main(["report", path, path]) == 0
    printed = capsys.readouterr().out
    [run] = reported(path)
    assert printed.count(path) == 2
    assert printed.endswith(f"{run['advice']['reason']}\n\n    {run['advice']['line']}\n")
    assert (f"This run is {run['advice']['kind']}. " in printed) == (run["advice"]["kind"] in KINDS)
    for threshold, share in run["advice"]["shares"].items():
        assert f"{float(threshold):.3g}" in printed
        assert f"{share:.2%}" in printed


def trained_with(line, path, bad, factor):
    """Train where the targets of some batches are wrong; return the clipped steps and the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer, weights = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(16, 1)

    def loss(wrong=1.0):
        inputs, noise = torch.randn(32, 16), torch.randn(32, 1) / 2
        targets = torch.tanh(inputs @ weights / 4) * 2 + noise
        return (model(inputs) - targets * wrong).square().mean()

    with clipper_by(line, optimizer, [JsonlSink(path), sink := MemorySink()]):
        for step in range(600):
            optimizer.zero_grad()
            loss(factor if step in bad else 1.0).backward()
            optimizer.step()
    clipped = {step.step for step in sink.steps if step.coefficient < 1 and not step.nonfinite}
    return clipped, sum(loss().item() for _ in range(20)) / 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bad", "factor"),
    [("spiky", (150, 300, 450, 590), 10.0), ("exploding", (300,), 1e4), ("quiet", (), 1.0)],
)
def test_a_training_with_the_advised_line_ends_better_than_without(tmp_path, kind, bad, factor):
    """A quiet one ends the same; a spiky or exploding one nearly as if no batch were wrong."""
    path = tmp_path / "run.jsonl"
    clipped, loss = trained_with("GradientClipper(optimizer, None)", path, bad, factor)
    [run] = reported(path)
    assert (run["advice"]["kind"], clipped) == (kind, set())
    clipped, better = trained_with(run["advice"]["line"], tmp_path / "again.jsonl", bad, factor)
    _, best = trained_with("GradientClipper(optimizer, None)", tmp_path / "best.jsonl", (), 1.0)
    assert clipped >= {*bad}
    assert len(clipped - {*bad}) < 12
    assert better < 1.1 * best
    assert better == loss if kind == "quiet" else not loss < 1.05 * better
