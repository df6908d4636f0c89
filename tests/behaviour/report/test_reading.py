"""Logs that ``gradclip report`` reads, warns of or refuses, and the facts that it finds in them."""

import math

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from gradclip import GradientClipper, JsonlSink, MemorySink
from gradclip.cli import main
from tests.support.curves import framed, log_run
from tests.support.report import log_line, reported
from tests.support.runs import quiet

NORMS = (4.0, 1.0, math.nan, 8.0, 2.0)


@pytest.fixture
def logged(tmp_path):
    """A run in both formats: a file of JSON lines and a directory of events."""
    places = [tmp_path / "a.jsonl", tmp_path / "a"]
    log_run([JsonlSink(places[0]), places[1]], *NORMS, nonfinite="skip")
    return places


def test_a_directory_is_searched_recursively_and_both_formats_tell_the_same(tmp_path, logged):
    with SummaryWriter(str(tmp_path / "b" / "of someone else")) as writer:
        writer.add_scalar("loss", 1.0, 0)
    (tmp_path / "notes.txt").write_text("{}")
    for run, place in zip(reported(tmp_path), logged, strict=True):
        assert run["name"] == str(place)
        assert (run["steps"], run["first_step"], run["last_step"]) == (5, 0, 4)
        assert (run["clip_rate"], run["nonfinite_steps"], run["skipped_steps"]) == (0.5, 1, 1)
        assert (run["mean"], run["largest"], run["quantiles"]["50.0"]) == (3.75, 8, 3)


def test_clippers_that_share_a_directory_are_runs_of_their_own(tmp_path, training):
    one = training()
    with GradientClipper(one.optimizer, 2.0, log=tmp_path):
        log_run(tmp_path, 5.0, 6.0, max_norm=None)
        one.take(3.0)
    first, second = reported(tmp_path)
    assert (first["name"], first["steps"], first["clip_rate"]) == (str(tmp_path), 1, 1)
    assert second["name"] == f"{tmp_path} (grad_norm_2)"
    assert (second["steps"], second["clip_rate"], second["mean"]) == (2, 0, 5.5)


@pytest.mark.parametrize("name", ["run.jsonl", "run"])
def test_of_a_resumed_run_the_later_steps_count(tmp_path, training, name):
    """Also where a step is skipped again."""
    where, state = tmp_path / name, None
    for first, norms in ([4.0, 1.0], [math.nan, 64.0]), ([], [math.nan, 8.0, 2.0]):
        run, log = training(), JsonlSink(where) if where.suffix else where
        with GradientClipper(run.optimizer, None, nonfinite="skip", log=log) as clipper:
            if state is not None:
                clipper.load_state_dict(state)
            run.take(*first)
            state = state or clipper.state_dict()
            run.take(*norms)
    [run] = reported(where)
    assert (run["steps"], run["last_step"], run["mean"], run["largest"]) == (5, 4, 3.75, 8)
    assert (run["nonfinite_steps"], run["skipped_steps"]) == (1, 1)


def test_damaged_files_are_read_as_far_as_possible_with_a_warning(capsys, logged):
    lines, [events] = logged[0], logged[1].iterdir()
    content = events.read_bytes()
    cut, foreign = "cut short or damaged, and was read up to that point", "records that are not"
    for damaged, steps, said in (
        (content[:-1], 4, cut),
        (content[:-20], 4, cut),
        (content[:-30] + b"?" + content[-29:], 4, cut),
        (content + framed([b"\xff"]), 5, foreign),
    ):
        events.write_bytes(damaged)
        assert reported(logged[1])[0]["steps"] == steps
        assert said in capsys.readouterr().err
    lines.write_bytes(lines.read_bytes()[:-10])
    assert reported(lines)[0]["steps"] == 4
    assert "1 of its lines are not steps and were ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        "foreign",
        *(log_line(1, 9.0, parameter_norms=norms) for norms in ([1.0], "text", 3.0)),
        *(log_line(1, 9.0, parameter_norms={"a": norm}) for norm in ([1.0], "text", 10**400)),
        log_line(1, 9.0).replace("9.0", f"{10**400}"),
        log_line(1, 9.0) + "," + log_line(1, 9.0),
    ],
)
def test_a_foreign_line_is_ignored_whole(capsys, tmp_path, wrong):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([log_line(0, 1.0), wrong, "", log_line(2, 3.0)]))
    [run] = reported(path)
    assert (run["steps"], run["last_step"], run["largest"]) == (2, 2, 3.0)
    assert "1 of its lines are not steps and were ignored" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello\n", b"[1, 2]\n", b'{"step": 1}\n', b"\x00" * 99])
@pytest.mark.parametrize("name", ["a.jsonl", "events.out.tfevents.1.a", "notes.txt"])
def test_a_file_without_a_run_is_refused(capsys, tmp_path, content, name):
    path, empty = tmp_path / name, tmp_path / "empty"
    path.write_bytes(content)
    empty.mkdir()
    for given, message in (
        (path, f"{name} has no steps in it ({len(content)} bytes)"),
        (tmp_path / "nowhere", "nowhere does not exist"),
        (empty, "has no run in it (0 files)"),
    ):
        assert main(["report", str(given)]) == 2
        assert message in capsys.readouterr().err


def test_quantiles_mean_and_largest_are_those_of_the_finite_norms(summary):
    found = summary([*range(1, 1001), math.nan, math.inf])
    quantiles = {str(percent): 1 + 9.99 * percent for percent in (10.0, 50.0, 90.0, 99.0, 99.9)}
    assert found["quantiles"] == pytest.approx(quantiles)
    assert (found["mean"], found["largest"], found["steps"]) == (500.5, 1000, 1002)
    assert found["nonfinite_steps"] == 2
    assert found["spike_line"] == 500.5 + 10 * 250


def test_spikes_are_listed_by_their_height(summary):
    norms = quiet(2000)
    norms[[700, 1234, 1999]] = 20, 300, 5
    found, usual = summary(norms), pytest.approx(1, rel=0.05)
    heights = [(spike["step"], spike["norm"], spike["usual"]) for spike in found["largest_spikes"]]
    assert heights == [(1234, 300, usual), (700, 20, usual), (1999, 5, usual)]
    assert found["spikes"] == 3


@pytest.mark.parametrize("step", [20, 29, 55, 99, 100, 101, 109, 110, 4999, 41_060])
def test_no_spike_is_overlooked(summary, step):
    """From the 21st step on, at the borders of windows, blocks and groups of blocks."""
    norms = quiet(max(step + 1, 500))
    norms[step] = 10
    assert [spike["step"] for spike in summary(norms)["largest_spikes"]] == [step]


def test_a_level_that_rises_slowly_is_a_trend_and_no_spike(summary):
    found = summary(quiet(4000) * np.geomspace(1, 10, 4000))
    assert found["spikes"] == summary([0.0] * 500)["spikes"] == summary([1.0] * 500)["spikes"] == 0
    assert found["trend"] == pytest.approx(10**0.75, rel=0.05)
    assert summary(quiet(4000))["trend"] == pytest.approx(1, rel=0.01)


def test_few_or_no_finite_norms(summary):
    one, none = summary([3.0]), summary([math.nan, math.inf])
    assert (one["mean"], one["largest"], one["spikes"], one["trend"]) == (3, 3, 0, None)
    assert (none["nonfinite_steps"], none["mean"]) == (2, None)
    assert {*none["quantiles"].values()} == {None}


@pytest.mark.parametrize("exceed", ["observe", "scale"])
def test_a_run_that_was_only_observed_is_told_from_one_that_was_clipped(tmp_path, capsys, exceed):
    """No norm of an observed run is smaller because of clipping: its advice needs no doubt."""
    norms, sink = [4.0, 5.0] * 150, MemorySink()
    log_run([JsonlSink(tmp_path / "a.jsonl"), tmp_path / "a", sink], *norms, exceed=exceed)
    observed = exceed == "observe"
    assert {step.observed for step in sink.steps} == {True if observed else None}
    for run in reported(tmp_path):
        assert (run["observed"], run["clip_rate"]) == (observed, 1.0)
        assert run["advice"]["max_norm"] == (10.0 if observed else "auto")
        assert run["advice"]["confidence"]["level"] == ("high" if observed else "medium")
        [note] = run["advice"]["warnings"]
        assert ("100.00% of the steps would have been clipped" in note) == observed
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("would have been clipped") == 4 * observed


def test_the_options_of_a_resumed_clipper_count(tmp_path):
    log_run(tmp_path, 4.0, exceed="observe")
    log_run(tmp_path, 4.0, first=1)
    [run] = reported(tmp_path)
    assert (run["steps"], run["observed"]) == (2, False)
