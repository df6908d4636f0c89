"""The facts that ``gradclip report`` finds in losses, and the sentence of the log about a spike."""

import math

import numpy as np
import pytest

import gradclip
from gradclip import JsonlSink, MemorySink
from gradclip.cli import main
from tests.support.curves import log_losses, log_run
from tests.support.report import log_norms, reported

CALM = (2.0 + 0.1 * np.random.default_rng(0).standard_normal(400)).tolist()


def facts_of(tmp_path, losses):
    path = tmp_path / "run.jsonl"
    log_losses(JsonlSink(path), *losses)
    return reported(path)[0]["losses"]


def test_both_formats_tell_the_same(tmp_path):
    """Of steps without a loss, and of losses that are not finite or that spike."""
    places = [tmp_path / "a.jsonl", tmp_path / "a"]
    losses = [None, math.nan, math.inf, *CALM[:300], None, 9.0, 2.0]
    log_losses([JsonlSink(places[0]), places[1]], *losses)
    for place in places:
        found = reported(place)[0]["losses"]
        [spike] = found.pop("largest_spikes")
        assert (spike["step"], spike["loss"]) == (304, 9.0)
        assert spike["usual"] == pytest.approx(np.mean(CALM[300 - 128 : 300]), rel=1e-6)
        assert found == {
            "steps": 304,
            "nonfinite": 2,
            "last": 2.0,
            "spikes": 1,
            "spike_rate": 1 / 302,
        }


@pytest.mark.parametrize("step", [63, 64, 127, 128, 129, 300, 4096 + 128])
def test_a_spike_of_the_report_is_one_of_the_log(tmp_path, step):
    """Wherever it is, and a loss just below the line is none."""
    losses = [*CALM, *CALM * 10][:step]
    window = losses[-128:]
    line = np.mean(window) + 6 * np.std(window, ddof=1)
    for loss, spikes in ((line * (1 - 1e-9), 0), (line * (1 + 1e-9), 1)):
        found = reported(written_losses(tmp_path, [*losses, loss]))[0]["losses"]
        assert found["spikes"] == spikes
        if step < 4096:
            log_losses(sink := MemorySink(), *losses, loss)
            assert sum("loss" in (row.incident or "") for row in sink.steps) == spikes


def written_losses(tmp_path, losses):
    """Write a log with these losses at once."""
    path = log_norms(tmp_path / "run.jsonl", [1.0] * len(losses))
    lines = path.read_text().splitlines()
    fields = zip(lines, losses, strict=True)
    path.write_text("\n".join(f'{line[:-1]}, "loss": {loss}}}' for line, loss in fields))
    return path


def test_too_few_losses_or_constant_ones_have_no_spike(tmp_path):
    assert facts_of(tmp_path, [*CALM[:62], 100.0])["spikes"] == 0
    assert (
        reported(written_losses(tmp_path, [2.0] * 200 + [2.0 + 1e-9]))[0]["losses"]["spikes"] == 0
    )


def test_losses_at_the_ends_of_the_range(tmp_path):
    """None of them is a spike, and none breaks the report."""
    found = facts_of(tmp_path, [1.7e308] * 100 + [-1.7e308, 1.7e308])
    assert (found["spikes"], found["last"]) == (0, 1.7e308)
    found = facts_of(tmp_path, [math.nan] * 3)
    assert (found["steps"], found["nonfinite"], found["last"], found["spike_rate"]) == (
        3,
        3,
        None,
        0,
    )


def test_of_a_resumed_run_the_later_losses_count(tmp_path):
    path = tmp_path / "run.jsonl"
    log_losses(JsonlSink(path), 5.0, 6.0)
    log_losses(JsonlSink(path), 2.0, None)
    found = reported(path)[0]["losses"]
    assert (found["steps"], found["last"]) == (1, 2.0)


def test_a_run_without_losses_says_nothing_of_them(tmp_path, capsys):
    """One with losses prints how many spiked."""
    without, path = tmp_path / "without.jsonl", tmp_path / "with.jsonl"
    log_run(JsonlSink(without), 1.0)
    assert reported(without)[0]["losses"] is None
    log_losses(JsonlSink(path), *CALM, 9.0, *CALM[:99])
    printed = []
    for each in (without, path):
        assert main(["report", str(each)]) == 0
        printed.append(capsys.readouterr().out)
    assert "loss spikes" not in printed[0]
    assert "1 (0.20%)" in printed[1]
    assert "largest loss spikes, at step" in printed[1]
    assert (
        "Note: Losses that spiked: 1, 0.20% of them. GradientClipper(optimizer, gradc" in printed[1]
    )


def test_the_advised_line_skips_the_spikes(tmp_path):
    """Those that the report counts, which it reads from a run without that line."""
    losses = [9.0 if step in (80, 300) else loss for step, loss in enumerate(CALM)]
    path = tmp_path / "run.jsonl"
    log_losses(JsonlSink(path), *losses)
    rule = gradclip.thresholds.MeanDeviation(6, loss=True)
    log_losses(sink := MemorySink(), *losses, max_norm=rule, exceed="skip")
    skipped = [step.step for step in sink.steps if step.skipped]
    found = reported(path)[0]["losses"]["largest_spikes"]
    assert skipped == sorted(spike["step"] for spike in found) == [80, 300]


def test_a_loss_that_is_no_number_is_in_a_foreign_line(tmp_path, capsys):
    path = written_losses(tmp_path, [1.0, '"text"', 2.0])
    [run] = reported(path)
    assert (run["steps"], run["losses"]["steps"]) == (2, 2)
    assert "1 of its lines are not steps" in capsys.readouterr().err
