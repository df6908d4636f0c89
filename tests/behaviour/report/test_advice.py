"""Advice of ``gradclip report``, and the effect of its line of code on the next training."""

import json
import math
import re
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
SUDDEN = QUIET * np.r_[np.ones(900), np.geomspace(2, 1e6, 20), np.full(COUNT - 920, 1e6)]
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


def fixed(found):
    """Return a line with the number that the advice names."""
    return f"GradientClipper(optimizer, {found['threshold']})"


def test_each_kind_of_run_gets_its_own_reason(advice):
    """Also where most steps leave one of the optimizers without gradients, as they alternate."""
    found = {kind: advice(norms) for kind, norms in KINDS.items()}
    assert {kind: each["kind"] for kind, each in found.items()} == {kind: kind for kind in KINDS}
    assert len({each["reason"] for each in found.values()}) == len(KINDS)
    for kind, norms in KINDS.items():
        idle = np.zeros((COUNT, 3))
        idle[:, 0] = norms
        alternating = advice(idle.ravel())
        assert (alternating["kind"], alternating["usual"] > 0) == (kind, True)


LINES = {
    "quiet": (QUIET, 2.7, "GradientClipper(optimizer, 2.7)"),
    "few": (QUIET[:61], 11, "GradientClipper(optimizer, 11)"),
    "spiky": (SPIKY, 1.7, 'GradientClipper(optimizer, "auto")'),
    "drifting": (DRIFTING, None, 'GradientClipper(optimizer, "auto")'),
    "exploding": (EXPLODING, 2.1, 'GradientClipper(optimizer, "auto", nonfinite="skip")'),
}


@pytest.mark.parametrize("run", LINES)
def test_auto_is_advised_except_for_a_safeguard(advice, run):
    """The reason says why, and which number would do instead where one fits."""
    norms, threshold, line = LINES[run]
    found, auto = advice(norms), '"auto"' in line
    assert (found["line"], found["threshold"]) == (line, threshold)
    assert found["max_norm"] == ("auto" if auto else threshold)
    assert ('"auto" follows the level of the norms' in found["reason"]) == auto
    assert ("needs no number" in found["reason"]) == auto
    named = auto and threshold is not None
    assert ("number that would do instead is" in found["reason"]) == named
    assert threshold is None or f"{threshold:g}" in found["reason"]


@pytest.mark.parametrize(
    ("norms", "threshold", "kind", "words"),
    [
        (QUIET, None, "quiet", ""),
        (QUIET, 1.0, "quiet", f"this training clipped {(QUIET > 1).mean():.2%} of its steps"),
        (spiked(QUIET, {10: 8.0})[:300], None, "quiet", ""),  # too early to be compared with others
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


@pytest.mark.parametrize(("threshold", "line"), [(1.0, '"auto"'), (1e3, "2.7"), (None, "2.7")])
def test_a_run_that_is_quiet_because_it_was_clipped_is_not_given_a_looser_threshold(
    advice, threshold, line
):
    """What its norms are without clipping nobody knows."""
    found = advice(QUIET, threshold)
    assert found["line"] == f"GradientClipper(optimizer, {line})"
    assert ('"auto" goes on limiting them' in found["reason"]) == (line == '"auto"')
    assert "2.7" in found["reason"]


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
    """The line and the number stop the explosion and clip nothing before it."""
    found = advice(SUDDEN)
    for line in (found["line"], fixed(found)):
        clipped = clipped_by(line, SUDDEN)
        assert not clipped[:900].any()
        assert clipped[920:].all()
    assert advice(spiked(QUIET, {5: 1e7}))["kind"] == "exploding"


def test_exploding_slowly(advice):
    """Norms that rise by 4 % a step are followed by the line, not by the number."""
    norms = QUIET * np.r_[np.ones(900), 1.04 ** np.arange(COUNT - 900)]
    found = advice(norms)
    by_line, by_number = (clipped_by(line, norms) for line in (found["line"], fixed(found)))
    assert found["kind"] == "exploding"
    assert by_line.mean() < 0.01
    assert by_number[940:].all()


def test_exploding_before_a_usual_norm_is_known(advice):
    """The number clips nearly every step: the norms before may belong to the explosion."""
    norms = np.r_[QUIET[:60], QUIET[60:120] * np.geomspace(1, 1e6, 60), [math.nan] * 80]
    found = advice(norms)
    assert found["kind"] == "exploding"
    assert "too few to know the usual norm" in found["reason"]
    assert clipped_by(fixed(found), norms)[:120].mean() > 0.95
    assert clipped_by(found["line"], norms)[70:120].all()


# Too few steps, and warm-ups


@pytest.mark.parametrize("height", [1.0, 2.3, 9.0])
@pytest.mark.parametrize("count", [1, 61, 199])
def test_few_steps_say_little(advice, count, height):
    """Neither a norm above the others nor a fall makes them a kind; the line clips none of them."""
    norms = spiked(QUIET, {count - 1: height})[:count]
    for each in (norms, norms * np.geomspace(20, 1, count)):
        found = advice(each)
        assert (found["kind"], found["confidence"]["level"]) == ("short", "low")
        assert f"{count} norm" in found["reason"]
        assert "too few to say more" in found["reason"]
        assert f"only {count} step" in found["confidence"]["reason"]
        assert "log 200 or more" in found["confidence"]["reason"]
        assert found["threshold"] == pytest.approx(10 * np.median(each), rel=0.1)
        assert not clipped_by(found["line"], each).any()


def test_few_steps_with_a_norm_far_above_the_others(advice):
    """It is named; from ten times the norms before on it is a spike, and NaN are never usual."""
    low, high, unusable = (spiked(QUIET, {40: height})[:61] for height in (2.3, 30.0, math.nan))
    usual = float(np.median(QUIET[:40]))
    assert f"though one was {low[40] / usual:.2g} times the median before" in advice(low)["reason"]
    assert "though" not in advice(QUIET[:61])["reason"]
    falling = spiked(QUIET, {40: 100.0})[:61] * np.geomspace(20, 1, 61)
    for norms, kind in ((high, "spiky"), (falling, "spiky"), (unusable, "exploding")):
        found = advice(norms)
        assert (found["kind"], found["confidence"]["level"]) == (kind, "low")


STEPS = np.arange(COUNT)
WARM_UPS = {
    "exponential": 1 + 5 * np.exp(-STEPS / 120),
    "linear": np.interp(STEPS, [0, 400, COUNT], [4, 1, 1]),
    "at once": np.where(STEPS < 450, 3.0, 1.0),
}
"""Factors of norms that fall over the first few hundred steps."""


@pytest.mark.parametrize("fall", WARM_UPS.values(), ids=WARM_UPS)
@pytest.mark.parametrize(("later", "kind"), [({}, "quiet"), (dict.fromkeys(SPIKES, 20), "spiky")])
def test_a_warm_up_is_no_drift(advice, fall, later, kind):
    """The advice is that for the level part alone, and says so."""
    norms = spiked(QUIET * fall, {step: factor for step, factor in later.items() if step > 600})
    found = advice(norms)
    said = re.search(
        r"fell in the first (\d+) steps, from a median of (\S+) there to one of (\S+) in the "
        r"(\d+) steps since.* is for the level part; a threshold of (\S+) would have clipped "
        r"(\S+)%",
        found["reason"],
    )
    count, rest = int(said[1]), int(said[4])
    assert (found["kind"], count + rest) == (kind, COUNT)
    assert 300 <= count <= 480
    level = advice(norms[count:])
    assert (found["line"], level["kind"]) == (level["line"], kind)
    assert found["threshold"] == level["threshold"] == float(said[5])
    assert found["reason"].endswith(level["reason"])
    assert found["confidence"] == level["confidence"]
    medians = [f"{np.median(part):.3g}" for part in (norms[:count], norms[count:])]
    assert [said[2], said[3]] == medians
    clipped = clipped_by(fixed(found), norms)
    assert f"{clipped[:count].mean():.2%}" == f"{said[6]}%"
    for later_clipped in (clipped, clipped_by(found["line"], norms)):
        assert later_clipped[count:].sum() == (norms[count:] > 10).sum()


def test_a_warm_up_that_was_clipped_is_not_given_a_looser_threshold(advice):
    """Though the level part, which the advice is for, was not clipped."""
    norms = QUIET * WARM_UPS["at once"]
    found = advice(norms, 3.5)
    assert (found["kind"], found["line"]) == ("quiet", 'GradientClipper(optimizer, "auto")')
    assert f"this training clipped {(norms > 3.5).mean():.2%} of its steps" in found["reason"]
    assert advice(norms, 3.5)["threshold"] == advice(norms)["threshold"]


@pytest.mark.parametrize(
    "fall",
    [
        np.geomspace(20, 1, COUNT),
        (STEPS + 10.0) ** -0.5,
        np.linspace(4, 1, COUNT),
        np.interp(STEPS, [0, 900, COUNT], [4, 1, 1]),  # level for less than half of the steps
        WARM_UPS["linear"][::-1],  # a rise, which is no warm-up
    ],
)
def test_norms_that_go_on_falling_or_rise_are_a_drift(advice, fall):
    assert advice(QUIET * fall)["kind"] == "drifting"


def test_a_warm_up_with_fewer_than_100_steps_after_it_is_a_drift(advice):
    """The rule that follows norms fits both."""
    steps = STEPS[:260]
    norms = QUIET[:260] * np.where(steps < 130, 5.0, 1.0)
    assert advice(norms)["kind"] == "quiet"
    idle = (steps >= 130) & (steps % 3 == 0)
    assert advice(np.where(idle, 0.0, norms))["kind"] == "drifting"


# How sure the advice is

SURE = {
    "quiet": (
        QUIET,
        None,
        "high",
        "the 1,200 steps alone would give the threshold 2.7, the second",
    ),
    "spiky": (SPIKY, None, "high", "1,200 steps show it."),
    "drifting": (DRIFTING, None, "high", "1,200 steps show it."),
    "one NaN": (spiked(QUIET, {1000: math.nan}), None, "high", "1,200 steps show it."),
    "no norm": ([math.nan] * 5, None, "high", "No step had a norm to judge by."),
    "norms of 0": ([0.0] * 5, None, "high", "The fault is sure; norms of 0 say"),
    "exploding": (EXPLODING, None, "medium", "Only a training with it shows whether"),
    "a fall": (QUIET[:999] * np.geomspace(9, 1, 999), None, "medium", "may be those of a warm-up"),
    "a rise": (QUIET[:999] * np.geomspace(1, 9, 999), None, "high", "999 steps show it."),
    "clipped": (QUIET, 1.0, "medium", f"This run clipped {(QUIET > 1).mean():.2%} of the steps"),
    "hardly clipped": (QUIET, float(np.quantile(QUIET, 0.96)), "high", "the second"),
    "one low spike": (
        *(spiked(QUIET, {700: 3.0}), None, "medium"),
        "It rests on 1 norm, less than 10 times the median before.",
    ),
    "two low spikes": (spiked(QUIET, {700: 3.0, 900: 4.0}), None, "medium", "rests on 2 norms,"),
    "three low spikes": (spiked(QUIET, dict.fromkeys(SPIKES, 3.0)), None, "high", "steps show it."),
    "one high spike": (spiked(QUIET, {700: 40.0}), None, "high", "1,200 steps show it."),
    "halves that differ": (QUIET ** np.where(STEPS < 600, 1, 2), None, "medium", "the second"),
    "halves far apart": (
        *(np.where(STEPS < 600, QUIET**0.5, 1.9 * QUIET**1.5), None, "low"),
        "would give the threshold 2.4, the second 5.9.",
    ),
    "halves that need no number": (
        *(QUIET ** np.where(STEPS < 600, 1, 12), None, "high"),
        "1,200 steps show it.",
    ),
    "an early explosion": (
        *(np.r_[QUIET[:60], QUIET[60:400] * np.geomspace(200, 1e9, 340)], None, "low"),
        "Only 60 steps came before the explosion.",
    ),
}


@pytest.mark.parametrize("norms", SURE)
def test_the_advice_says_how_sure_it_is_and_why(advice, norms):
    """As sure as the gravest doubt allows."""
    norms, threshold, level, reason = SURE[norms]
    found = advice(norms, threshold)["confidence"]
    assert found["level"] == level, found
    assert reason in found["reason"]


def test_the_halves_give_the_thresholds_that_are_said(advice):
    reason = advice(QUIET)["confidence"]["reason"]
    said = re.findall(r"threshold (\S+), the second (\S+)\.$", reason)
    halves = [threshold_in(advice(half)["line"]) for half in (QUIET[:600], QUIET[600:])]
    assert [*map(float, said[0])] == halves


def test_a_log_without_clipped_norms_leaves_a_doubt(tmp_path):
    """Trainers log the norms before clipping alone."""
    rows = [{"step": step, "grad_norm": norm} for step, norm in enumerate(QUIET)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows}))
    [run] = reported(path)
    sure = run["advice"]["confidence"]
    assert sure == {"level": "medium", "reason": "The log does not say which steps were clipped."}


def test_the_share_that_a_spike_line_clips(advice):
    norms = np.random.default_rng(0).pareto(1.2, COUNT) + 1
    found = advice(norms)
    share = clipped_by(fixed(found), norms).mean()
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


@pytest.mark.parametrize("odd", [1.79e308, 1e-300, 5e-324])
def test_means_and_medians_of_the_largest_and_smallest_norms_are_exact(summary, odd):
    """No sum of two norms leaves the range of float64, and no half of one becomes 0."""
    norms = np.where(np.arange(304) % 2, odd, 1.79e308)
    found = summary(norms)
    assert found["mean"] == pytest.approx(1.79e308 / 2 + odd / 2)
    assert found["quantiles"]["50.0"] == pytest.approx(1.79e308 / 2 + odd / 2)
    assert found["trend"] == pytest.approx(1)
    assert found["spikes"] == 0
    tiny = summary([5e-324] * 304)
    assert (tiny["mean"], tiny["spike_line"], tiny["trend"]) == (5e-324, 5e-324, 1)


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
    reason, line = run["advice"]["reason"], run["advice"]["line"]
    confidence = "Confidence: {level}. {reason}".format(**run["advice"]["confidence"])
    assert printed.endswith(f"{reason}\n{confidence}\n\n    {line}\n")
    kind = run["advice"]["kind"]
    assert (f"This run is {kind}. " in printed) == (kind != "unknown")
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


def test_an_explosion_of_clipped_norms_is_the_learning_rates(summary):
    """The clipped norms of a training with a rate that is too high explode all the same."""
    [note] = summary(EXPLODING, threshold=2.0)["advice"]["warnings"]
    assert "Lower the learning rate" in note
    assert "Lower the learning rate" not in str(summary(EXPLODING)["advice"]["warnings"])
    assert "Lower the learning rate" not in str(summary(SPIKY, threshold=0.5)["advice"]["warnings"])
